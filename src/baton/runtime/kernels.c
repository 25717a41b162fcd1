/* A transformer layer over few tokens, in one call: what a decode step costs when nothing but the weights is read.

   Weights stay as the model stores them, [out, in] in float32 or bfloat16, and are read once for all rows. Sums are in
   float32, and each is taken in one order whatever else is computed beside it: a row's numbers depend neither on its
   neighbours nor on how many tokens are read at once. The residual stream is float32 too.

   Compiled on first use by `baton.runtime.native`, for the machine it runs on. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2)));
typedef int8_t vb_any __attribute__((vector_size(16), aligned(1)));
typedef uint16_t bf16;
#define LANES 16
#define INLINE static inline __attribute__((always_inline))

enum { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum { SILU = 0, RELU = 1, GELU_TANH = 2, GELU = 3 };
enum { RMS = 0, RMS_PLUS_ONE = 1, MEAN = 2, NONE = 3 }; /* by the root mean square; weights count from 1; LayerNorm */

typedef struct {
  const void *weight, *bias; /* [out, in] and [out], or NULL */
  const float *scales;       /* [out]: what int8 weights are to be multiplied by; NULL with others */
  int64_t out, in, kind;     /* kind: of the weights; those that are no copies are of the layer's dtype */
} Linear;

typedef struct {
  const void *weight, *bias; /* [d] */
} Norm;

/* One layer. Parts that a family does not have are NULL. */
typedef struct {
  Linear q, k, v, o, cross_q, cross_o, gate, up, down; /* without gate there is only `gate`; q may give k and v too */
  Norm norm, cross_norm, mlp_norm, post_norm, post_mlp_norm; /* before parts, and of what two of them give */
  Norm q_norm, k_norm;                                       /* [width], of every head */
  const float *bias;                                         /* [heads, bias_size], added by distance */
  const void *cross_keys, *cross_values;                     /* [rows, heads, cross_slots, width] */
  int64_t heads, kv_heads, width, cross_slots, bias_size, bias_offset, window;
  int64_t head_step, first_key, first_value; /* where heads lie in what q, k and v give of a token */
  int64_t turned, angles;                    /* numbers of a head that turn by position, and by which of the tables */
  float epsilon, scale, cap; /* cap: of scores, which then never are farther from 0; 0: none */
  int32_t dtype, activation, norms, parallel; /* parallel: the feed-forward part reads what attention reads */
  int32_t after;                              /* the three norms stand behind their parts, on the residual stream */
} Layer;

/* What all layers of one pass share. */
typedef struct {
  float *hidden;            /* [tokens, d], all rows' tokens one after another; changed in place */
  char *keys, *values;      /* [layers, rows and more, kv_heads, capacity, width] */
  const int32_t *starts;    /* [rows], slots in use before */
  const int32_t *begins;    /* [rows + 1], where each row's tokens begin; it may have fewer than `count` */
  const int32_t *lengths;   /* [rows], of an encoder's rows: all attend to all; NULL: each to what is before it */
  const int32_t *positions; /* [rows, count] */
  const uint8_t *tree;      /* [rows, count, count], who sees whom among the new tokens; NULL: a chain */
  const float *cos, *sin;   /* [tables, reach, turned / 2], or NULL */
  const int32_t *cross_lengths; /* [rows] */
  char *scratch;            /* `scratch_bytes` of them */
  void *states;             /* [tokens, d] in the weights' dtype, of the whole pass: what the head is given */
  int64_t rows, count, d, slots, reach, capacity, layer_bytes; /* slots: most that a row attends to */
  int32_t threads;
} Pass;

static int64_t tokens_of(const Pass *p) { return p->begins[p->rows]; }
static int64_t count_of(const Pass *p, int64_t row) { return p->begins[row + 1] - p->begins[row]; }

INLINE vf load_f32(const float *p) { return *(const vf_any *)p; }
INLINE void store_f32(float *p, vf v) { *(vf_any *)p = v; }
INLINE vf load_bf16(const bf16 *p) {
#if defined(__AVX512F__) /* what compilers make of the other is twice as long */
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
  return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16);
#endif
}
INLINE vf load(const void *p, int64_t i, int dtype) {
  if (dtype == INT8) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)p + i))));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const vb_any *)((const int8_t *)p + i), vi), vf);
#endif
  }
  return dtype == BF16 ? load_bf16((const bf16 *)p + i) : load_f32((const float *)p + i);
}
INLINE float load_one(const void *p, int64_t i, int dtype) {
  if (dtype == F32) return ((const float *)p)[i];
  union { uint32_t u; float f; } both = {(uint32_t)((const bf16 *)p)[i] << 16};
  return both.f;
}
/* To the nearest, ties to even; what is not a number stays so. */
INLINE void store(void *p, int64_t i, vf v, int dtype) {
  if (dtype == F32) { store_f32((float *)p + i, v); return; }
  vu u = (vu)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vi number = v == v;
  *(vh_any *)((bf16 *)p + i) = __builtin_convertvector((rounded & (vu)number) | (0x7fc0 & ~(vu)number), vh_any);
}
INLINE int64_t size_of(int dtype) { return dtype == INT8 ? 1 : dtype == BF16 ? 2 : 4; }
INLINE vf splat(float x) { return x - (vf){0}; }
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef float v4_any __attribute__((vector_size(16), aligned(4)));
INLINE float sum(vf v) {
  union { vf all; v8 half[2]; } a = {v};
  union { v8 all; v4 half[2]; } b = {a.half[0] + a.half[1]};
  v4 c = b.half[0] + b.half[1];
  return (c[0] + c[2]) + (c[1] + c[3]);
}
/* The same sums, in the same order, of four vectors at once. */
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
INLINE v4 sum4(vf a, vf b, vf c, vf d) {
  vf ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
          SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  vf cd = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
          SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  vf all = SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all += SHUFFLE(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all += SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return SHUFFLE(all, all, 0, 4, 8, 12);
}
#else
INLINE v4 sum4(vf a, vf b, vf c, vf d) { return (v4){sum(a), sum(b), sum(c), sum(d)}; }
#endif
INLINE vf pick(vi where, vf yes, vf no) { return (vf)(((vi)yes & where) | ((vi)no & ~where)); }

INLINE int any(vi where) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)where, (__m512i)where) != 0;
#else
  int found = 0;
  for (int i = 0; i < LANES; i++) found |= where[i];
  return found;
#endif
}

/* e^x, relative error below 2e-7: 2^n times a polynomial in what is left. 0 below -120, a number for all numbers. */
INLINE vf exponential(vf x) {
#if defined(__AVX512F__)
  x = (vf)_mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-120.0f), (__m512)x));
  const vf scaled = x * 1.44269504f, f = (vf)_mm512_roundscale_ps((__m512)scaled, _MM_FROUND_TO_NEAREST_INT);
#else
  x = pick(x < -120.0f, splat(-120.0f), x);
  x = pick(x > 88.0f, splat(88.0f), x);
  const vf scaled = x * 1.44269504f;
  const vi n = __builtin_convertvector(scaled + pick(scaled < 0.0f, splat(-0.5f), splat(0.5f)), vi);
  const vf f = __builtin_convertvector(n, vf);
#endif
  const vf r = x - f * 0.693145752f - f * 1.42860677e-6f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)f);
#else
  return p * (vf)(((n + 127) << 23) & (n > -127));
#endif
}

/* Call for what lies some tiles ahead: into the nearest cache where there is little to compute meanwhile, or else into
   the next, which takes more requests at a time. */
INLINE void ahead(const void *p, int64_t tile, int m) {
  if (m <= 2) __builtin_prefetch((const char *)p + 4 * tile, 0, 3);
  else __builtin_prefetch((const char *)p + 2 * tile, 0, 2);
}

/* out[i][j] of m <= 4 rows of x and n <= 4 rows of w: one running sum of lanes each, in the order of k.
   The rows of w that follow are called for meanwhile, in the order in which they lie: one row is too short for the
   hardware to see that others follow. */
#define TILE 4
#define EACH(i, n) _Pragma("GCC unroll 4") for (int i = 0; i < n; i++)
INLINE void tile(const void *w, const void *x, int64_t k, int m, int n, int kind, int dtype, float *out) {
  vf acc[TILE][TILE];
  EACH(i, m) EACH(j, n) acc[i][j] = (vf){0};
#if defined(__AVX512BF16__)
  if (kind == BF16 && dtype == BF16 && k % (2 * LANES) == 0) {
    for (int64_t at = 0; at < k; at += 2 * LANES) {
      __m512bh b[TILE];
      EACH(j, n) {
        b[j] = (__m512bh)_mm512_loadu_si512((const bf16 *)w + j * k + at);
        ahead((const bf16 *)w + TILE * at + j * 2 * LANES, TILE * k * 2, m);
      }
      EACH(i, m) {
        __m512bh a = (__m512bh)_mm512_loadu_si512((const bf16 *)x + i * k + at);
        EACH(j, n) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], a, b[j]);
      }
    }
  } else
#endif
    for (int64_t at = 0; at < k; at += LANES) {
      vf b[TILE];
      EACH(j, n) {
        b[j] = load(w, j * k + at, kind);
        ahead((const char *)w + (TILE * at + j * LANES) * size_of(kind), TILE * k * size_of(kind), m);
      }
      EACH(i, m) {
        vf a = load(x, i * k + at, dtype);
        EACH(j, n) acc[i][j] += a * b[j];
      }
    }
  if (n == TILE) EACH(i, m) *(v4_any *)(out + i * TILE) = sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
  else EACH(i, m) EACH(j, n) out[i * TILE + j] = sum(acc[i][j]);
}

/* The same with sizes that the compiler knows, where they are the usual ones. */
#define SIZED(NAME, KIND, DTYPE)                                                                      \
  static void NAME(const void *w, const void *x, int64_t k, int m, int n, float *out) {               \
    if (n < TILE) tile(w, x, k, m, n, KIND, DTYPE, out);                                              \
    else if (m == 1) tile(w, x, k, 1, TILE, KIND, DTYPE, out);                                        \
    else if (m == 2) tile(w, x, k, 2, TILE, KIND, DTYPE, out);                                        \
    else if (m == 3) tile(w, x, k, 3, TILE, KIND, DTYPE, out);                                        \
    else tile(w, x, k, TILE, TILE, KIND, DTYPE, out);                                                 \
  }
/* Four bits to a weight, one scale to GROUP inputs of a row. TILE rows are kept together: of each BLOCK inputs come, row
   by row, GROUP numbers of 16 bits, number i with inputs i, 32 + i, 64 + i and 96 + i from its low bits up, then TILE x 4
   scales in bfloat16. Four bits stand for 8 less than they say. */
#define GROUP 32
#define BLOCK (4 * GROUP)
#define BLOCK_BYTES (TILE * (BLOCK / 2 + 4 * 2))
INLINE vf level(vu bits) { /* of the low four */
#if defined(__AVX512F__)
  const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return (vf)_mm512_permutexvar_ps((__m512i)bits, levels); /* looks at no others */
#else
  return __builtin_convertvector((vi)(bits & 15) - 8, vf);
#endif
}

/* As `tile`, of TILE rows in four bits: each group's sum begins at zero, and is scaled into the running one. */
INLINE void tile_int4(const void *w, const void *x, int64_t k, int m, int dtype, float *out) {
  vf acc[TILE][TILE];
  EACH(i, m) EACH(j, TILE) acc[i][j] = (vf){0};
  const char *block = w;
  for (int64_t at = 0; at < k; at += BLOCK, block += BLOCK_BYTES) {
    const uint16_t *numbers = (const uint16_t *)block;
    const int groups = k - at < BLOCK ? (int)((k - at) / GROUP) : 4;
    const bf16 *scales = numbers + TILE * GROUP;
    EACH(line, (BLOCK_BYTES + 63) / 64) __builtin_prefetch(block + 4096 + 64 * line, 0, 3); /* blocks lie in one row */
#if defined(__AVX512BF16__)
    if (dtype == BF16) { /* all levels are exact in bfloat16 */
      static const bf16 sixteen[] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                     0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
      /* twice: the fifth bit, which is looked at too, belongs to another weight */
      const __m512i levels = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)sixteen));
      __m512i bits[TILE];
      EACH(j, TILE) bits[j] = _mm512_loadu_si512(numbers + j * GROUP);
      EACH(g, groups) {
        __m512bh b[TILE];
        vf scale[TILE];
        EACH(j, TILE) {
          scale[j] = (vf)_mm512_slli_epi32(_mm512_set1_epi16((short)scales[j * 4 + g]), 16);
          b[j] = (__m512bh)_mm512_permutexvar_epi16(bits[j], levels);
          bits[j] = _mm512_srli_epi16(bits[j], 4);
        }
        EACH(i, m) {
          const __m512bh a = (__m512bh)_mm512_loadu_si512((const bf16 *)x + i * k + at + g * GROUP);
          EACH(j, TILE) acc[i][j] += (vf)_mm512_dpbf16_ps(_mm512_setzero_ps(), a, b[j]) * scale[j];
        }
      }
      continue;
    }
#endif
    vu low[TILE], high[TILE];
    EACH(j, TILE) {
      low[j] = __builtin_convertvector(*(const vh_any *)(numbers + j * GROUP), vu);
      high[j] = __builtin_convertvector(*(const vh_any *)(numbers + j * GROUP + LANES), vu);
    }
    EACH(g, groups) {
      vf one[TILE], two[TILE];
      EACH(j, TILE) {
        one[j] = level(low[j]), two[j] = level(high[j]);
        low[j] >>= 4, high[j] >>= 4;
      }
      EACH(i, m) {
        const vf a = load(x, i * k + at + g * GROUP, dtype), b = load(x, i * k + at + g * GROUP + LANES, dtype);
        EACH(j, TILE) {
          vf part = {0}; /* not the first product: then a compiler could choose which of the two it rounds */
          part += a * one[j];
          part += b * two[j];
          acc[i][j] += part * load_one(scales, j * 4 + g, BF16);
        }
      }
    }
  }
  EACH(i, m) *(v4_any *)(out + i * TILE) = sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

SIZED(tile_f32, F32, F32)
SIZED(tile_bf16, BF16, BF16)
SIZED(tile_int8_f32, INT8, F32)
SIZED(tile_int8_bf16, INT8, BF16)
#define SIZED_INT4(NAME, DTYPE)                                                                       \
  static void NAME(const void *w, const void *x, int64_t k, int m, int n, float *out) {               \
    (void)n; /* rows are filled up to TILE */                                                         \
    if (m == 1) tile_int4(w, x, k, 1, DTYPE, out);                                                    \
    else if (m == 2) tile_int4(w, x, k, 2, DTYPE, out);                                               \
    else if (m == 3) tile_int4(w, x, k, 3, DTYPE, out);                                               \
    else tile_int4(w, x, k, TILE, DTYPE, out);                                                        \
  }
SIZED_INT4(tile_int4_f32, F32)
SIZED_INT4(tile_int4_bf16, BF16)

/* Outputs [first, last) of a linear map for m rows of x, [m, in] in the layer's dtype; added to `out` or put there. */
static void linear(const Linear *l, const void *x, int64_t m, int dtype, int64_t first, int64_t last, float *out,
                   int64_t stride, int add) {
  static void (*const tiles[][2])(const void *, const void *, int64_t, int, int, float *) = {
      {tile_f32, 0}, {0, tile_bf16}, {tile_int8_f32, tile_int8_bf16}, {tile_int4_f32, tile_int4_bf16}};
  void (*run)(const void *, const void *, int64_t, int, int, float *) = tiles[l->kind][dtype];
  const int64_t x_row = l->in * size_of(dtype), blocks = (l->in + BLOCK - 1) / BLOCK;
  const int64_t w_row = l->kind == INT4 ? blocks * (BLOCK_BYTES / TILE) : l->in * size_of((int)l->kind);
  for (int64_t n = first; n < last; n += TILE) {
    const int wide = last - n < TILE ? (int)(last - n) : TILE;
    const char *w = (const char *)l->weight + n * w_row;
    for (int64_t i = 0; i < m; i += TILE) {
      const int high = m - i < TILE ? (int)(m - i) : TILE;
      float part[TILE * TILE];
      run(w, (const char *)x + i * x_row, l->in, high, wide, part);
      if (wide == TILE && !l->scales && !l->bias) {
        for (int r = 0; r < high; r++) {
          v4_any *at = (v4_any *)(out + (i + r) * stride + n);
          const v4 y = *(v4_any *)(part + r * TILE);
          *at = add ? *at + y : y;
        }
        continue;
      }
      for (int r = 0; r < high; r++)
        for (int j = 0; j < wide; j++) {
          float y = part[r * TILE + j];
          if (l->scales) y *= l->scales[n + j];
          if (l->bias) y += load_one(l->bias, n + j, dtype);
          float *at = out + (i + r) * stride + n + j;
          *at = add ? *at + y : y;
        }
    }
  }
}

/* A row of x, [d], normed: into `out` in the weights' dtype; or added to `sums`, or put there where they are x itself.
   One copy, which rounds in one way. */
static __attribute__((noinline)) void norm_row(const Norm *n, int kind, const float *x, int64_t d, float epsilon, int dtype,
                                               void *out, float *sums) {
  if (kind == NONE) {
    for (int64_t at = 0; at < d; at += LANES) store(out, at, load_f32(x + at), dtype);
    return;
  }
  vf all = {0}, squares = {0};
  if (kind == MEAN)
    for (int64_t at = 0; at < d; at += LANES) all += load_f32(x + at);
  const float mean = kind == MEAN ? sum(all) / (float)d : 0.0f;
  for (int64_t at = 0; at < d; at += LANES) {
    vf v = load_f32(x + at) - mean;
    squares += v * v;
  }
  const float by = 1.0f / sqrtf(sum(squares) / (float)d + epsilon);
  for (int64_t at = 0; at < d; at += LANES) {
    vf weight = load(n->weight, at, dtype), y = load_f32(x + at);
    if (kind == MEAN) y -= mean;
    if (kind == RMS_PLUS_ONE) weight += 1.0f;
    y = y * by * weight;
    if (n->bias) y += load(n->bias, at, dtype);
    if (sums) store_f32(sums + at, sums == x ? y : load_f32(sums + at) + y);
    else store(out, at, y, dtype);
  }
}

/* e^(-x^2/2) gives the error function of x / sqrt 2 to 1.5e-7: Abramowitz and Stegun, 7.1.26. */
INLINE vf normal_below(vf x) { /* what lies below x of a normal distribution */
  const vf z = pick(x < 0.0f, -x, x) * 0.70710678f, t = 1.0f / (z * 0.3275911f + 1.0f);
  vf tail = t * 1.061405429f - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = (tail * t + 0.254829592f) * t * exponential(-z * z) * 0.5f;
  return pick(x < 0.0f, tail, 1.0f - tail);
}

INLINE vf activate(vf x, int kind) {
  if (kind == RELU) return pick(x < 0.0f, (vf){0}, x); /* what is no number stays so */
  if (kind == SILU) return x / (exponential(-x) + 1.0f);
  if (kind == GELU_TANH) { /* x * sigmoid(2 y) is x/2 (1 + tanh y) */
    vf y = (x * x * x * 0.044715f + x) * 0.7978845608f;
    return x / (exponential(y * -2.0f) + 1.0f);
  }
  return x * normal_below(x);
}

/* A thread's share of n things, in whole vectors. */
static void share(int64_t n, int64_t *first, int64_t *last) {
  const int64_t parts = (n + LANES - 1) / LANES, all = omp_get_num_threads(), me = omp_get_thread_num();
  *first = parts * me / all * LANES;
  *last = parts * (me + 1) / all * LANES;
  if (*last > n) *last = n;
}

/* cap * tanh(x / cap) */
INLINE vf capped(vf x, float cap) { return cap - 2.0f * cap / (exponential(x * (2.0f / cap)) + 1.0f); }

/* m <= 4 queries that share keys and values: softmax(scale q k, capped, + what scores[slot] holds) v. Slots at -inf are not seen.

   q: [m, width]; k, v: [slots, width]; out: [m, width], all in the weights' dtype; scores: [m, stride]. Weights are summed
   in lanes by where their tokens would lie in a plain pass (a tree's by `positions`, of slots from `start` on; NULL: where
   they lie), and values one slot after another: no result depends on what lies between the slots that are seen. */
INLINE void attend(const void *q, const void *k, const void *v, int64_t slots, int64_t width, float scale, float cap,
                   float *scores, int64_t stride, int64_t start, const int32_t *positions, int m, int dtype, void *out) {
  float by[TILE];
  for (int64_t s = 0; s < slots; s += TILE) {
    const int wide = slots - s < TILE ? (int)(slots - s) : TILE;
    float part[TILE * TILE];
    (dtype == BF16 ? tile_bf16 : tile_f32)((const char *)k + s * width * size_of(dtype), q, width, m, wide, part);
    if (cap) store_f32(part, capped(load_f32(part) * scale, cap));
    const float factor = cap ? 1.0f : scale;
    for (int i = 0; i < m; i++) {
      float *at = scores + i * stride + s;
      if (wide == TILE) *(v4_any *)at += *(v4_any *)(part + i * TILE) * factor;
      else
        for (int j = 0; j < wide; j++) at[j] += part[i * TILE + j] * factor;
    }
  }
  const int64_t padded = (slots + LANES - 1) / LANES * LANES, whole = positions ? start / LANES * LANES : padded;
  EACH(i, m) {
    float *own = scores + i * stride;
    for (int64_t s = slots; s < padded; s++) own[s] = -INFINITY;
    vf high = splat(-INFINITY), total = {0};
    for (int64_t s = 0; s < padded; s += LANES) high = pick(load_f32(own + s) > high, load_f32(own + s), high);
    float most = high[0];
    for (int j = 1; j < LANES; j++) most = high[j] > most ? high[j] : most;
    for (int64_t s = 0; s < padded; s += LANES) {
      const vf y = exponential(load_f32(own + s) - most); /* 0 for what is not seen */
      store_f32(own + s, y);
      if (s < whole) total += y;
    }
    if (positions) {
      float few[LANES];
      store_f32(few, total);
      for (int64_t s = whole; s < slots; s++)
        few[(s < start ? s : start + positions[s - start] - positions[0]) & (LANES - 1)] += own[s];
      total = load_f32(few);
    }
    by[i] = 1.0f / sum(total);
  }
#define WIDE 4 /* vectors at a time, as far as there are registers */
  const int vectors = m <= 2 ? WIDE : WIDE / 2;
  for (int64_t at = 0; at < width; at += vectors * LANES) {
    int64_t place[WIDE]; /* what is beyond the width is done twice */
    vf acc[WIDE][TILE];
    EACH(c, vectors) {
      place[c] = at + c * LANES < width ? at + c * LANES : width - LANES;
      EACH(i, m) acc[c][i] = (vf){0};
    }
    for (int64_t s = 0; s < slots; s++)
      EACH(c, vectors) {
        const vf some = load(v, s * width + place[c], dtype);
        EACH(i, m) acc[c][i] += some * scores[i * stride + s];
      }
    EACH(c, vectors) EACH(i, m) store(out, i * width + place[c], acc[c][i] * by[i], dtype);
  }
}
#define ATTEND(NAME, DTYPE)                                                                                     \
  static void NAME(const void *q, const void *k, const void *v, int64_t slots, int64_t width, float scale, float cap, \
                   float *scores, int64_t stride, int64_t start, const int32_t *positions, int m, void *out) {  \
    if (m == 1) attend(q, k, v, slots, width, scale, cap, scores, stride, start, positions, 1, DTYPE, out);          \
    else if (m == 2) attend(q, k, v, slots, width, scale, cap, scores, stride, start, positions, 2, DTYPE, out);     \
    else if (m == 3) attend(q, k, v, slots, width, scale, cap, scores, stride, start, positions, 3, DTYPE, out);     \
    else attend(q, k, v, slots, width, scale, cap, scores, stride, start, positions, TILE, DTYPE, out);              \
  }
ATTEND(attend_f32, F32)
ATTEND(attend_bf16, BF16)

/* Turn the first numbers of a head by its position, arXiv 2104.09864; their halves are turned together. */
static void turn(float *x, const float *cos, const float *sin, int64_t turned) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

static void norm_head(float *x, const Norm *n, int kind, int64_t width, float epsilon, int dtype) {
  float squares = 0;
  for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
  const float by = 1.0f / sqrtf(squares / (float)width + epsilon), from = kind == RMS_PLUS_ONE ? 1.0f : 0.0f;
  for (int64_t i = 0; i < width; i++) x[i] *= by * (from + load_one(n->weight, i, dtype));
}

INLINE int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static char *take(char **at, int64_t bytes) {
  char *found = *at;
  *at += rounded(bytes);
  return found;
}

INLINE float bias_at(const float *bias, const Layer *l, int64_t distance) {
  const int64_t at = distance + l->bias_offset; /* a node that is deeper than the query is never seen: any bias will do */
  return bias[at < 0 ? 0 : at < l->bias_size ? at : l->bias_size - 1];
}

/* What a query may see, as the start of its scores: 0 or the bias by distance, and -inf where it may not look. */
static void look(const Layer *l, const Pass *p, int64_t row, int64_t query, int64_t head, int64_t slots, float *scores) {
  const int64_t n = p->count, start = p->starts[row], here = p->positions[row * n + query];
  const float *bias = l->bias ? l->bias + head * l->bias_size : 0;
  int64_t s = 0;
  if (l->window)
    for (; s < start && here - s >= l->window; s++) scores[s] = -INFINITY;
  if (bias)
    for (; s < start; s++) scores[s] = bias_at(bias, l, here - s);
  else if (s < start) {
    memset(scores + s, 0, 4 * (start - s));
    s = start;
  }
  for (; s < slots; s++) { /* the new tokens */
    const int64_t j = s - start, place = p->positions[row * n + j];
    int seen = p->lengths || (p->tree ? p->tree[(row * n + query) * n + j] : j <= query);
    if (l->window && here - place >= l->window) seen = 0;
    scores[s] = !seen ? -INFINITY : bias ? bias_at(bias, l, here - place) : 0.0f;
  }
}

/* Queries that share keys and values, TILE at a time: of the heads of a group and a row's n tokens, head by head, those
   from `at` up to `all`. They are made from `from`, [n, wide], whose rows start at the group's first head, `step` before the next. Output goes to `seen`, of all
   tokens, [tokens, out_width], in the weights' dtype. */
static void attend_group(const Layer *l, const Pass *p, int64_t row, int64_t first, int64_t at, int64_t all,
                         const float *from, int64_t wide, int64_t step, const void *keys, const void *values,
                         int64_t slots, int cross, char *mine, int64_t padded, char *seen) {
  const int64_t n = count_of(p, row), width = l->width, out_width = l->heads * width;
  const int64_t bytes = size_of(l->dtype);
  char *q = take(&mine, TILE * width * 4), *out = take(&mine, TILE * width * 4);
  float *scores = (float *)mine;
  const int chain = !cross && !p->lengths && !p->tree;
  const int32_t *tree = cross || !p->tree ? 0 : p->positions + row * p->count;
  for (; at < all; at += TILE) {
    const int m = all - at < TILE ? (int)(all - at) : TILE;
    const int64_t begin = at % n, end = begin + m < n ? begin + m : n; /* of a chain, the last that a query looks at */
    const int64_t seeing = chain ? p->starts[row] + end : slots;
    for (int t = 0; t < m; t++) {
      const int64_t head = (at + t) / n, i = (at + t) % n;
      for (int64_t c = 0; c < width; c += LANES)
        store(q, t * width + c, load_f32(from + i * wide + head * step + c), l->dtype);
      if (cross) memset(scores + t * padded, 0, 4 * slots);
      else look(l, p, row, i, first + head, seeing, scores + t * padded);
    }
    (l->dtype == BF16 ? attend_bf16 : attend_f32)(q, keys, values, seeing, width, l->scale, l->cap, scores, padded,
                                                  p->starts[row], tree, m, out);
    for (int t = 0; t < m; t++) {
      const int64_t head = (at + t) / n, i = (at + t) % n;
      memcpy(seen + ((p->begins[row] + i) * out_width + (first + head) * width) * bytes, out + t * width * bytes, width * bytes);
    }
  }
}

/* Bytes from the first key to the first of a row's in a layer. */
static int64_t kept_at(const Layer *l, const Pass *p, int64_t index, int64_t row, int64_t group) {
  return index * p->layer_bytes + (row * l->kv_heads + group) * p->capacity * l->width * size_of(l->dtype);
}

/* One of `pieces` of the queries of a unit, which is a row and a group of heads that share keys and values. */
static void attend_own(const Layer *l, const Pass *p, int64_t index, int64_t unit, int64_t piece, int64_t pieces,
                       const float *qkv, int64_t wide, char *mine, int64_t padded, char *seen) {
  const int64_t row = unit / l->kv_heads, group = unit % l->kv_heads, groups = l->heads / l->kv_heads;
  const int64_t n = count_of(p, row), all = groups * n, each = (all + pieces - 1) / pieces, first = group * groups;
  const int64_t slots = p->lengths ? p->lengths[row] : p->starts[row] + n, at = kept_at(l, p, index, row, group);
  const int64_t end = (piece + 1) * each < all ? (piece + 1) * each : all;
  attend_group(l, p, row, first, piece * each, end, qkv + p->begins[row] * wide + first * l->head_step, wide,
               l->head_step, p->keys + at, p->values + at, slots, 0, mine, padded, seen);
}

/* Up to so many tokens each thread norms all of them for itself, which is cheaper than to wait for the others. */
#define FEW 16

/* Bytes that a thread works in by itself: normed tokens; queries, their output and scores. */
static int64_t thread_bytes(const Layer *l, int64_t tokens, int64_t d, int64_t slots) {
  const int64_t padded = (slots + LANES - 1) / LANES * LANES;
  return rounded(4 * (tokens < FEW ? tokens : FEW) * d) + 2 * rounded(4 * TILE * l->width) + rounded(4 * TILE * padded);
}

INLINE int64_t qkv_out(const Layer *l) { return l->q.out + l->k.out + l->v.out; }
INLINE int64_t widest(const Layer *l, int64_t d) { return l->gate.out > d ? l->gate.out : d; }

/* Bytes that `layer` works in. */
int64_t scratch_bytes(const Layer *l, int64_t tokens, int64_t d, int64_t slots, int32_t threads) {
  const int64_t a_token = qkv_out(l) + l->heads * l->width + 3 * widest(l, d) + d;
  return 4 * tokens * a_token + 8 * 64 + threads * thread_bytes(l, tokens, d, slots);
}

/* All tokens normed, in the weights' dtype; called by all threads of a region. */
static const void *normed(const Layer *l, const Pass *p, const Norm *norm, void *mine, void *shared) {
  const int64_t m = tokens_of(p), d = p->d, row = d * size_of(l->dtype);
  const int kind = l->after ? NONE : l->norms;
  if (m <= FEW) {
    for (int64_t i = 0; i < m; i++)
      norm_row(norm, kind, p->hidden + i * d, d, l->epsilon, l->dtype, (char *)mine + i * row, 0);
    return mine;
  }
#pragma omp for schedule(static)
  for (int64_t i = 0; i < m; i++)
    norm_row(norm, kind, p->hidden + i * d, d, l->epsilon, l->dtype, (char *)shared + i * row, 0);
  return shared;
}

/* What a part gives of `x`, [m, in], added to the residual stream: after a norm `of` it, if there is one, and before the
   norm of the sum where that stands `behind` the part; called by all threads. */
static void give(const Layer *l, const Pass *p, const Linear *map, const Norm *of, const Norm *behind, const void *x,
                 float *given) {
  const int64_t m = tokens_of(p), d = p->d;
  const Norm *norm = l->after ? behind : of;
  float *from = l->after ? p->hidden : given;
  int64_t first, last;
  share(d, &first, &last);
  linear(map, x, m, l->dtype, first, last, norm->weight ? from : p->hidden, d, l->after || !norm->weight);
  if (!norm->weight) return;
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t i = 0; i < m; i++) norm_row(norm, l->norms, from + i * d, d, l->epsilon, l->dtype, 0, p->hidden + i * d);
}

/* The feed-forward part up to what its last map is given, [m, inner]; called by all threads. */
static void feed(const Layer *l, const Pass *p, void *few, void *shared, float *gate, float *up, char *product) {
  const int64_t m = tokens_of(p), inner = l->gate.out;
  int64_t first, last;
  const void *x = normed(l, p, &l->mlp_norm, few, shared);
  share(inner, &first, &last);
  linear(&l->gate, x, m, l->dtype, first, last, gate, inner, 0);
  if (l->up.weight) linear(&l->up, x, m, l->dtype, first, last, up, inner, 0);
  for (int64_t i = 0; i < m; i++)
    for (int64_t c = i * inner + first; c < i * inner + last; c += LANES) {
      vf y = activate(load_f32(gate + c), l->activation);
      store(product, c, l->up.weight ? y * load_f32(up + c) : y, l->dtype);
    }
}

/* Called by all threads. */
static void layer(const Layer *l, const Pass *p, int64_t index) {
  const int64_t m = tokens_of(p), d = p->d, width = l->width, groups = l->heads / l->kv_heads;
  const int64_t q_out = l->heads * width, wide = qkv_out(l), step = l->head_step, half = l->turned / 2;
  const int64_t bytes = size_of(l->dtype), padded = (p->slots + LANES - 1) / LANES * LANES;
  const int dtype = l->dtype;
  char *free = p->scratch;
  float *qkv = (float *)take(&free, 4 * m * wide);
  char *seen = take(&free, 4 * m * q_out), *product = take(&free, 4 * m * l->gate.out);
  float *gate = (float *)take(&free, 4 * m * widest(l, d)), *up = (float *)take(&free, 4 * m * l->gate.out);
  char *shared = take(&free, 4 * m * d), *own = free;
  char *mine = own + omp_get_thread_num() * thread_bytes(l, m, d, p->slots);
  void *few = take(&mine, 4 * (m < FEW ? m : FEW) * d);
  int64_t first, last, at = 0;
  const void *x = normed(l, p, &l->norm, few, shared);
  for (const Linear *part = &l->q; part <= &l->v; at += part++->out) {
    if (!part->weight) continue;
    share(part->out, &first, &last);
    linear(part, x, m, dtype, first, last, qkv + at, wide, 0);
  }
#pragma omp barrier
  const int64_t units = p->rows * l->kv_heads, threads = omp_get_num_threads();
  /* Of a unit's queries, where there are too few units for all threads; more of many queries, whose last see most. */
  const int64_t share_of = units >= threads ? 2 : (threads + units - 1) / units;
  const int64_t pieces = units >= 2 * threads || units % threads == 0 ? 1 : share_of * (p->count < 32 ? 1 : 4);
#pragma omp for schedule(static)
  for (int64_t unit = 0; unit < units; unit++) {
    const int64_t row = unit / l->kv_heads, group = unit % l->kv_heads, start = p->starts[row], n = count_of(p, row);
    for (int64_t i = 0; i < n; i++) {
      float *token = qkv + (p->begins[row] + i) * wide, *k = token + l->first_key + group * step;
      const float *v = token + l->first_value + group * step;
      for (int64_t h = 0; h <= groups; h++) { /* the queries of the group, then its key */
        float *vector = h < groups ? token + (group * groups + h) * step : k;
        const Norm *norm = h < groups ? &l->q_norm : &l->k_norm;
        if (norm->weight) norm_head(vector, norm, l->norms, width, l->epsilon, dtype);
        if (half) {
          const int64_t angle = (l->angles * p->reach + p->positions[row * p->count + i]) * half;
          turn(vector, p->cos + angle, p->sin + angle, l->turned);
        }
      }
      const int64_t slot = kept_at(l, p, index, row, group) / bytes + (start + i) * width;
      for (int64_t c = 0; c < width; c += LANES) {
        store(p->keys, slot + c, load_f32(k + c), dtype);
        store(p->values, slot + c, load_f32(v + c), dtype);
      }
    }
    if (pieces == 1) attend_own(l, p, index, unit, 0, 1, qkv, wide, mine, padded, seen);
  }
  if (pieces > 1) {
#pragma omp for schedule(static, 1)
    for (int64_t piece = 0; piece < units * pieces; piece++)
      attend_own(l, p, index, piece / pieces, piece % pieces, pieces, qkv, wide, mine, padded, seen);
  }
  if (l->parallel) {
    feed(l, p, few, shared, gate, up, product);
#pragma omp barrier
  }
  give(l, p, &l->o, &l->post_norm, &l->norm, seen, gate);
#pragma omp barrier
  if (l->cross_q.weight) {
    x = normed(l, p, &l->cross_norm, few, shared);
    share(q_out, &first, &last);
    linear(&l->cross_q, x, m, dtype, first, last, qkv, wide, 0);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p->rows * l->heads; unit++) {
      const int64_t row = unit / l->heads, h = unit % l->heads, at = unit * l->cross_slots * width * bytes;
      attend_group(l, p, row, h, 0, count_of(p, row), qkv + p->begins[row] * wide + h * width, wide, width,
                   (const char *)l->cross_keys + at, (const char *)l->cross_values + at, p->cross_lengths[row], 1,
                   mine, padded, seen);
    }
    const Norm none = {0};
    give(l, p, &l->cross_o, &none, &l->cross_norm, seen, gate);
#pragma omp barrier
  }
  if (!l->parallel) {
    feed(l, p, few, shared, gate, up, product);
#pragma omp barrier
  }
  give(l, p, &l->down, &l->post_mlp_norm, &l->mlp_norm, product, gate);
#pragma omp barrier
}

/* The `many` largest numbers of each row of x, [m, n], best first, and where they are; of equal ones the earlier first.
   What is not a number counts as -inf. */
void top(const float *x, int64_t m, int64_t n, int64_t many, float *values, int64_t *where) {
  for (int64_t i = 0; i < m; i++, x += n, values += many, where += many) {
    int64_t held = 0;
    float least = -INFINITY;
    for (int64_t at = 0; at < n; at += LANES) {
      const int64_t end = n - at < LANES ? n : at + LANES;
      if (held == many && end - at == LANES && !any(load_f32(x + at) > least)) continue;
      for (int64_t c = at; c < end; c++) {
        const float own = x[c] == x[c] ? x[c] : -INFINITY;
        if (held == many && !(own > least)) continue;
        int64_t place = held < many ? held++ : many - 1;
        for (; place > 0 && own > values[place - 1]; place--) values[place] = values[place - 1], where[place] = where[place - 1];
        values[place] = own, where[place] = c;
        least = values[held - 1];
      }
    }
  }
}

/* Layers from `first` up to `last`. */
void run(const Layer *layers, int64_t first, int64_t last, const Pass *p) {
#pragma omp parallel num_threads(p->threads)
  for (int64_t i = first; i < last; i++) layer(layers + i, p, i);
}

/* Rows of x, [m, d] in float32, normed into the weights' dtype; in place where there is no `out`. */
void norm(const Norm *n, float *x, int64_t m, int64_t d, float epsilon, int32_t kind, int32_t dtype, void *out) {
  for (int64_t i = 0; i < m; i++)
    norm_row(n, kind, x + i * d, d, epsilon, dtype, out ? (char *)out + i * d * size_of(dtype) : 0, out ? 0 : x + i * d);
}

/* A linear map by itself: x, [m, in] in the weights' dtype, to out, [m, out] in float32. */
void map(const Linear *l, const void *x, int64_t m, int32_t dtype, int32_t threads, float *out) {
#pragma omp parallel num_threads(threads)
  {
    int64_t first, last;
    share(l->out, &first, &last);
    linear(l, x, m, dtype, first, last, out, l->out, 0);
  }
}

/* What comes before the layers and after them. */
typedef struct {
  const void *table;   /* [vocabulary, d], in the layers' dtype */
  const float *places; /* [places_count, d], added by position, or NULL */
  Norm first, norm;    /* of embeddings, if they have one; before the head, of kind `norms` */
  Linear head;
  int64_t vocabulary, places_count;
  float first_epsilon, epsilon, width, scale; /* width: what embeddings are multiplied by; scale: what the head is given */
  int32_t norms, dtype;
} Ends;

/* Token ids, [rows, count], to what the first layer is given. Returns the first id that is none, or -1. */
int64_t enter(const Ends *e, const Pass *p, const int64_t *ids) {
  const int64_t d = p->d, n = p->count, last = e->places_count - 1;
  for (int64_t row = 0; row < p->rows; row++)
    for (int64_t i = 0; i < count_of(p, row); i++) {
      const int64_t id = ids[row * n + i], here = p->positions[row * n + i];
      if (id < 0 || id >= e->vocabulary) return id < 0 ? e->vocabulary : id;
      float *out = p->hidden + (p->begins[row] + i) * d;
      for (int64_t c = 0; c < d; c += LANES) {
        vf x = load(e->table, id * d + c, e->dtype) * e->width;
        if (e->places) x += load_f32(e->places + (here < last ? here : last) * d + c);
        store_f32(out + c, x);
      }
    }
  if (e->first.weight) norm(&e->first, p->hidden, tokens_of(p), d, e->first_epsilon, MEAN, e->dtype, 0);
  return -1;
}

/* A whole pass, from token ids, [rows, count], to logits, [rows, count, head.out], 0 where a row has no token. Returns as
   `enter` does. */
int64_t whole(const Ends *e, const Layer *layers, int64_t depth, const Pass *p, const int64_t *ids, float *logits) {
  void *states = p->states;
  const int64_t m = tokens_of(p), d = p->d, n = p->count, wide = e->head.out;
  const int64_t wrong = enter(e, p, ids);
  if (wrong >= 0) return wrong;
  run(layers, 0, depth, p);
  norm(&e->norm, p->hidden, m, d, e->epsilon, e->norms, e->dtype, states);
  if (e->scale != 1.0f)
    for (int64_t c = 0; c < m * d; c += LANES) store(states, c, load(states, c, e->dtype) * e->scale, e->dtype);
  map(&e->head, states, m, e->dtype, p->threads, logits);
  if (m < p->rows * n) /* each row to its place; from the last, so that none is overwritten before it was moved */
    for (int64_t row = p->rows - 1; row >= 0; row--) {
      const int64_t own = count_of(p, row);
      memmove(logits + row * n * wide, logits + p->begins[row] * wide, 4 * own * wide);
      memset(logits + (row * n + own) * wide, 0, 4 * (n - own) * wide);
    }
  return -1;
}
