"""Proof or refutation that drafting changes speed only."""

from baton.audit.exact import AuditReport, Difference, Method, audit

__all__ = ["AuditReport", "Difference", "Method", "audit"]
