// The sparse operations of a TopK SAE on a CPU: what reference.py defines, for float32.
//
// The file is compiled once for each instruction set (see LEVELS in cpu.py), and the best one that the machine runs is loaded.
// Every function is called by several threads at once with the same arguments: the work is cut into numbered blocks, which the
// threads draw from the shared counter `next`. No sum crosses a block, so the result does not depend on who does what.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

using std::int32_t;
using std::int64_t;

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 16;  // floats in a vector; vectors that a sum over rows holds at a time
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 8;
#else
constexpr int LANES = 4, REGISTERS = 8;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline float sum(vec v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

static inline bool take(int64_t* next, int64_t n_blocks, int64_t& block) {
  block = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
  return block < n_blocks;
}
static inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

static float dot(const float* a, const float* b, int64_t d) {
  vec s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t c = 0;
  for (; c + 4 * LANES <= d; c += 4 * LANES) {
    s0 += load(a + c) * load(b + c);
    s1 += load(a + c + LANES) * load(b + c + LANES);
    s2 += load(a + c + 2 * LANES) * load(b + c + 2 * LANES);
    s3 += load(a + c + 3 * LANES) * load(b + c + 3 * LANES);
  }
  for (; c + LANES <= d; c += LANES) s0 += load(a + c) * load(b + c);
  float s = sum((s0 + s1) + (s2 + s3));
  for (; c < d; c++) s += a[c] * b[c];
  return s;
}

static inline void prefetch(const float* p, int64_t n_floats) {
  for (int64_t c = 0; c < n_floats; c += 16) __builtin_prefetch(p + c);
}

// ---- sums of rows ----------------------------------------------------------------------------------------------------

// out[c] = sum_i weights[i] * matrix[rows[i]][c] for V vectors from column c0: the sum stays in registers.
template <int V, typename Index>
static inline void sum_columns(const float* weights, const Index* rows, int64_t m, const float* matrix, int64_t d, int64_t c0,
                               float* out) {
  vec acc[V] = {};
  for (int64_t i = 0; i < m; i++) {
    if (i + 3 < m) prefetch(matrix + rows[i + 3] * d + c0, V * LANES);
    const float* row = matrix + rows[i] * d + c0;
#pragma GCC unroll 16
    for (int u = 0; u < V; u++) acc[u] += weights[i] * load(row + u * LANES);
  }
#pragma GCC unroll 16
  for (int u = 0; u < V; u++) store(out + c0 + u * LANES, acc[u]);
}

template <typename Index>
static void sum_rows(const float* weights, const Index* rows, int64_t m, const float* matrix, int64_t d, float* out) {
  int64_t c = 0;
  for (; c + REGISTERS * LANES <= d; c += REGISTERS * LANES) sum_columns<REGISTERS>(weights, rows, m, matrix, d, c, out);
  for (; c + 4 * LANES <= d; c += 4 * LANES) sum_columns<4>(weights, rows, m, matrix, d, c, out);
  for (; c + LANES <= d; c += LANES) sum_columns<1>(weights, rows, m, matrix, d, c, out);
  for (; c < d; c++) {
    float s = 0;
    for (int64_t i = 0; i < m; i++) s += weights[i] * matrix[rows[i] * d + c];
    out[c] = s;
  }
}

// ---- selection ---------------------------------------------------------------------------------------------------------

// Order-preserving integers: NaN counts as the largest, so that it reaches the loss.
static inline int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
  return x != x ? 0x7fffffff : key;
}
static inline float value_of(int32_t key) {
  int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The largest t with at least k keys >= t; with slack, some t with k to k + slack of them, if one turns up on the way.
static int32_t threshold(const int32_t* keys, int m, int k, int slack) {
  int32_t lo = keys[0], hi = keys[0];
  for (int i = 1; i < m; i++) lo = std::min(lo, keys[i]), hi = std::max(hi, keys[i]);
  while (lo < hi) {
    int32_t mid = (int32_t)(lo + ((int64_t)hi - lo + 1) / 2);
    int n_above = 0;
    for (int i = 0; i < m; i++) n_above += keys[i] >= mid;
    if (n_above < k) {
      hi = mid - 1;
    } else {
      lo = mid;
      if (n_above <= k + slack) break;
    }
  }
  return lo;
}

// Write the k largest of m scores, rectified, and their ids; of scores that tie the first ones. Needs k <= m.
static void select(const float* scores, const int32_t* ids, int m, int k, int32_t* keys, float* values, int64_t* indices) {
  for (int i = 0; i < m; i++) keys[i] = key_of(scores[i]);
  int32_t t = threshold(keys, m, k, 0);
  int ties = k;
  for (int i = 0; i < m; i++) ties -= keys[i] > t;
  for (int i = 0, o = 0; o < k; i++) {
    if (keys[i] < t || (keys[i] == t && ties-- <= 0)) continue;
    values[o] = scores[i] > 0 || scores[i] != scores[i] ? scores[i] : 0.f;
    indices[o++] = ids[i];
  }
}

// Keep the scores whose key reaches t, in order, with their positions; returns how many. `scores` holds n + 16 places.
static int gather_above(const float* p, int64_t n, int32_t t, float* scores, int32_t* ids) {
  int o = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i low = _mm512_set1_epi32(0x7fffffff), bar = _mm512_set1_epi32(t);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16, at = _mm512_add_epi32(at, _mm512_set1_epi32(16))) {
    __m512 x = _mm512_loadu_ps(p + i);
    __m512i bits = _mm512_castps_si512(x);
    __m512i key = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), low));
    __mmask16 keep = _mm512_cmpge_epi32_mask(key, bar) | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    if (!keep) continue;
    _mm512_storeu_ps(scores + o, _mm512_maskz_compress_ps(keep, x));
    _mm512_storeu_si512(ids + o, _mm512_maskz_compress_epi32(keep, at));
    o += __builtin_popcount(keep);
  }
#endif
  for (; i < n; i++) {
    scores[o] = p[i];
    ids[o] = (int32_t)i;
    o += key_of(p[i]) >= t;
  }
  return o;
}

extern "C" {

// The best of LEVELS in cpu.py that this machine runs.
int level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
  if (wide && __builtin_cpu_supports("avx512vnni")) return 3;
  if (wide) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Whether this build can screen in int8.
int screens() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

// ---- encode ------------------------------------------------------------------------------------------------------------

// x = (resid - shift) / divisor - bias, where shift and divisor are repeated along axes of stride 0.
void frame(const float* resid, const float* shift, int64_t shift_layer, int64_t shift_token, int64_t shift_feature,
           const float* divisor, int64_t divisor_layer, int64_t divisor_token, const float* bias, int64_t n_layers,
           int64_t n_tokens, int64_t d, float* x, int64_t* next) {
  const int64_t size = 64, n_rows = n_layers * n_tokens;
  std::vector<float> flat(d);
  for (int64_t block; take(next, blocks(n_rows, size), block);) {
    for (int64_t r = block * size; r < std::min(n_rows, (block + 1) * size); r++) {
      const int64_t layer = r / n_tokens, token = r % n_tokens;
      const float* s = shift + layer * shift_layer + token * shift_token;
      if (!shift_feature) {
        std::fill(flat.begin(), flat.end(), *s);
        s = flat.data();
      }
      const float q = divisor[layer * divisor_layer + token * divisor_token];
      const float* in = resid + r * d;
      float* out = x + r * d;
      for (int64_t c = 0; c < d; c++) out[c] = (in[c] - s[c]) / q - bias[c];
    }
  }
}

// The k largest of each row of pre-activations [rows, n]. A bound from the maxima of groups leaves few to choose from.
void top_rows(const float* pre_acts, int64_t n_rows, int64_t n, int64_t k, float* values, int64_t* indices, int64_t* next) {
  const int64_t size = 8;
  const int64_t group = std::clamp<int64_t>(n / (4 * k), 1, 32);  // a group is every 16th entry of a run of 16 * group
  const int64_t n_groups = n / (16 * group) * 16;
  std::vector<float> scores(n + 16);
  std::vector<int32_t> ids(n + 16), keys(n + 16);
  for (int64_t block; take(next, blocks(n_rows, size), block);) {
    for (int64_t r = block * size; r < std::min(n_rows, (block + 1) * size); r++) {
      const float* p = pre_acts + r * n;
      int32_t t = std::numeric_limits<int32_t>::min();
      if (n_groups >= k) {
        for (int64_t g = 0; g < n_groups; g += 16) {
          int32_t best[16];
          const float* run = p + g * group;
          for (int i = 0; i < 16; i++) best[i] = key_of(run[i]);
          for (int64_t u = 1; u < group; u++)
            for (int i = 0; i < 16; i++) best[i] = std::max(best[i], key_of(run[16 * u + i]));
          std::memcpy(&keys[g], best, sizeof best);
        }
        t = threshold(keys.data(), n_groups, k, k / 8);
      }
      int m = gather_above(p, n, t, scores.data(), ids.data());
      select(scores.data(), ids.data(), m, k, keys.data(), values + r * k, indices + r * k);
    }
  }
}

// ---- encode, screened in int8 --------------------------------------------------------------------------------------------
//
// x . w of two rows quantised to q(x), q(w) is off by at most |x - q(x)| |w| + |q(x)| |w - q(w)| (Cauchy-Schwarz), and by the
// rounding of float32. So each int8 product gives an upper bound of a pre-activation. Latents whose upper bound is below a bar are
// dropped; the rest are few, and their products are taken in float32. The bar is a guess: the k-th largest int8 product, less a
// little, for true errors are a small part of their bound. In the end k exact products must reach it, which proves that nothing
// dropped belongs to the k largest; a row where they do not is multiplied again in float32.
// Both rows are first turned by one rotation, which changes no product and spreads an outlying dimension over many.

#if defined(__AVX512VNNI__)
constexpr int TILE = 64, TILE_ROWS = 6;  // latents and rows of the product that registers hold
constexpr int ROWS = 96;                 // rows for which a tile of latents is read once
constexpr int PLACES = 1024;             // latents in doubt that a row may have
constexpr float MARGIN = 0.125f;         // of a product's bound of error: how far below it the bar is guessed
constexpr float HUGE_NORM = 1e18f;       // products of longer rows may overflow: they, and NaN, are left to float32

static inline int64_t padded(int64_t d) { return blocks(d, 16) * 16; }

// Hadamard rotation of the `span` vectors of 16 at v, a power of 2: butterflies between vectors.
static void across(float* v, int64_t span) {
  for (int64_t h = 1; h < span; h *= 2)
    for (int64_t i = 0; i < span; i += 2 * h)
      for (int64_t j = i; j < i + h; j++) {
        const vec a = load(v + 16 * j), b = load(v + 16 * (j + h));
        store(v + 16 * j, a + b);
        store(v + 16 * (j + h), a - b);
      }
  const float scale = 1 / std::sqrt((float)span);
  for (int64_t c = 0; c < 16 * span; c++) v[c] *= scale;
}

// The same within each of m vectors.
static void within(float* v, int64_t m) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < m; i++) {
    __m512 x = _mm512_loadu_ps(v + 16 * i);
    for (int h = 1; h < 16; h *= 2) {
      const __m512i half = _mm512_set1_epi32(h);
      const __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, half), x);
      x = _mm512_mask_sub_ps(_mm512_add_ps(other, x), _mm512_test_epi32_mask(lane, half), other, x);
    }
    _mm512_storeu_ps(v + 16 * i, _mm512_mul_ps(x, _mm512_set1_ps(0.25f)));
  }
}

// The rotated row: within each vector, over the first 2^i vectors, and, where m is no power of 2, then over the last 2^i.
static void rotate(const float* row, int64_t d, float* v) {
  const int64_t m = padded(d) / 16;
  std::memcpy(v, row, d * sizeof(float));
  std::fill(v + d, v + 16 * m, 0.f);
  int64_t span = 1;
  while (2 * span <= m) span *= 2;
  within(v, m);
  across(v, span);
  if (span < m) across(v + 16 * (m - span), span);
}

struct Quantised {
  float scale, norm, lost;  // q * scale stands for the row; norms of the row and of what that misses
};

static Quantised quantise(const float* v, int64_t size, int8_t* q) {
  float largest = 0;
  for (int64_t c = 0; c < size; c++) largest = std::max(largest, std::fabs(v[c]));
  const bool whole_row_lost = largest < 1e-30f;  // its scale would be no normal number
  const float scale = whole_row_lost ? 1 : largest / 127, inverse = whole_row_lost ? 0 : 1 / scale;
  vec norm = {}, lost = {};
  for (int64_t c = 0; c < size; c += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(v + c), _mm512_set1_ps(inverse)));
    _mm_storeu_si128((__m128i*)(q + c), _mm512_cvtsepi32_epi8(whole));
    const vec x = load(v + c), miss = x - (vec)_mm512_cvtepi32_ps(whole) * scale;
    norm += x * x;
    lost += miss * miss;
  }
  return {scale, std::sqrt(sum(norm)), std::sqrt(sum(lost))};
}

// Tiles of 64 latents: [tile][d / 4][64][4] bytes q + 128, and each latent's scale, norm and loss. Padding can never be chosen.
void pack(const float* W, int64_t n, int64_t d, uint8_t* packed, float* scale, float* norm, float* lost, int64_t* next) {
  const int64_t size = padded(d);
  std::vector<float> v(size);
  std::vector<int8_t> q(size);
  for (int64_t tile; take(next, blocks(n, TILE), tile);) {
    uint8_t* out = packed + tile * TILE * size;
    for (int64_t i = 0; i < TILE; i++) {
      const int64_t j = tile * TILE + i;
      Quantised of = {0, -std::numeric_limits<float>::infinity(), 0};
      std::fill(q.begin(), q.end(), 0);
      if (j < n) {
        rotate(W + j * d, d, v.data());
        of = quantise(v.data(), size, q.data());
      }
      scale[j] = of.scale, norm[j] = of.norm, lost[j] = of.lost;
      for (int64_t c = 0; c < size; c += 4) {
        uint32_t four;
        std::memcpy(&four, &q[c], 4);
        four ^= 0x80808080u;
        std::memcpy(out + c * TILE + 4 * i, &four, 4);
      }
    }
  }
}

// What is known of one row while the tiles go by.
struct Doubts {
  float bar;        // latents whose upper bound is below it are dropped
  int m, prune_at;  // latents in doubt; how many make it worth raising the bar
  float *upper, *likely;  // bound, and what the product is at least, unless rounding was unkind
  int32_t* ids;

  void raise_bar(int k, int32_t* keys) {
    for (int i = 0; i < m; i++) keys[i] = key_of(likely[i]);
    bar = std::max(bar, value_of(threshold(keys, m, k, k / 4)));
    int o = 0;
    const __m512 level = _mm512_set1_ps(bar);
    for (int i = 0; i < m; i += 16) {
      const __mmask16 here = m - i < 16 ? (1 << (m - i)) - 1 : 0xffff;
      const __m512 u = _mm512_loadu_ps(upper + i);
      const __mmask16 keep = _mm512_mask_cmp_ps_mask(here, u, level, _CMP_GE_OQ);
      const __m512 l = _mm512_loadu_ps(likely + i);
      const __m512i id = _mm512_loadu_si512(ids + i);
      _mm512_storeu_ps(upper + o, _mm512_maskz_compress_ps(keep, u));
      _mm512_storeu_ps(likely + o, _mm512_maskz_compress_ps(keep, l));
      _mm512_storeu_si512(ids + o, _mm512_maskz_compress_epi32(keep, id));
      o += __builtin_popcount(keep);
    }
    m = o;
    prune_at = std::min(PLACES, std::max(4 * k, 2 * m));
  }
};

// The int8 products of TILE_ROWS rows with a tile of latents.
static inline void multiply(const int8_t* const* q, const int32_t* offset, const uint8_t* tile, int64_t size, int32_t* out) {
  __m512i acc[TILE_ROWS][4];
#pragma GCC unroll 6
  for (int a = 0; a < TILE_ROWS; a++)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) acc[a][u] = _mm512_set1_epi32(offset[a]);
  for (int64_t c = 0; c < size; c += 4) {
    const uint8_t* w = tile + c * TILE;
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64), w2 = _mm512_loadu_si512(w + 128),
                  w3 = _mm512_loadu_si512(w + 192);
#pragma GCC unroll 6
    for (int a = 0; a < TILE_ROWS; a++) {
      int32_t four;
      std::memcpy(&four, q[a] + c, 4);
      const __m512i x = _mm512_set1_epi32(four);
      acc[a][0] = _mm512_dpbusd_epi32(acc[a][0], w0, x);
      acc[a][1] = _mm512_dpbusd_epi32(acc[a][1], w1, x);
      acc[a][2] = _mm512_dpbusd_epi32(acc[a][2], w2, x);
      acc[a][3] = _mm512_dpbusd_epi32(acc[a][3], w3, x);
    }
  }
#pragma GCC unroll 6
  for (int a = 0; a < TILE_ROWS; a++)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) _mm512_storeu_si512(out + (a * 4 + u) * 16, acc[a][u]);
}

// scores[i] = <row, W[ids[i]]> for the i in `chosen`.
static void rescore(const float* row, const float* W, int64_t d, const int32_t* ids, const int32_t* chosen, int m, float* scores) {
  for (int i = 0; i < m; i++) {
    if (i + 4 < m) prefetch(W + (int64_t)ids[chosen[i + 4]] * d, d);
    scores[chosen[i]] = dot(row, W + (int64_t)ids[chosen[i]] * d, d);
  }
}

// The k largest of x @ W^T in each row, rectified. Rows in which too many latents stay in doubt, or that are not finite, are
// marked in `redo` instead. `rescored` counts the float32 products of each row.
void screen(const float* x, int64_t n_rows, int64_t d, const uint8_t* packed, const float* scale, const float* norm,
            const float* lost, const float* W, int64_t n, int64_t k, float* values, int64_t* indices, uint8_t* redo,
            int32_t* rescored, int64_t* next) {
  const int64_t size = padded(d);
  const float rounding = (2 * size + 64) * 6e-8f;  // of the rotation, of a float32 product and of the bounds themselves
  std::vector<float> v(size), row_scale(ROWS), by_norm(ROWS), by_lost(ROWS), scores(PLACES + TILE);
  std::vector<int8_t> q(ROWS * size);
  std::vector<int32_t> offset(ROWS + TILE_ROWS), keys(PLACES + TILE), ids(ROWS * (PLACES + TILE)), products(TILE_ROWS * TILE), chosen(PLACES + TILE);
  std::vector<float> upper(ROWS * (PLACES + TILE)), likely(ROWS * (PLACES + TILE));
  std::vector<Doubts> doubts(ROWS);
  for (int64_t block; take(next, blocks(n_rows, ROWS), block);) {
    const int64_t first = block * ROWS;
    const int rows = (int)std::min<int64_t>(ROWS, n_rows - first);
    for (int r = 0; r < rows; r++) {
      rotate(x + (first + r) * d, d, v.data());
      const Quantised of = quantise(v.data(), size, &q[r * size]);
      int32_t total = 0;
      for (int64_t c = 0; c < size; c++) total += q[r * size + c];
      offset[r] = -128 * total;  // the latents are stored with 128 added
      row_scale[r] = of.scale, by_norm[r] = of.lost + rounding * of.norm, by_lost[r] = of.norm + of.lost;
      const int64_t at = r * (PLACES + TILE);
      const bool finite = of.norm < HUGE_NORM;
      doubts[r] = {finite ? -std::numeric_limits<float>::max() : std::numeric_limits<float>::infinity(), 0,
                   (int)std::min<int64_t>(PLACES, 8 * k), &upper[at], &likely[at], &ids[at]};
      redo[first + r] = !finite;
    }
    for (int64_t tile = 0; tile < blocks(n, TILE); tile++) {
      for (int r = 0; r < rows; r += TILE_ROWS) {
        const int8_t* at[TILE_ROWS];
        for (int a = 0; a < TILE_ROWS; a++) at[a] = &q[std::min(r + a, rows - 1) * size];
        multiply(at, &offset[r], packed + tile * TILE * size, size, products.data());
        for (int a = 0; a < std::min(TILE_ROWS, rows - r); a++) {
          Doubts& row = doubts[r + a];
          const __m512 bar = _mm512_set1_ps(row.bar), s = _mm512_set1_ps(row_scale[r + a]);
          const __m512 en = _mm512_set1_ps(by_norm[r + a]), el = _mm512_set1_ps(by_lost[r + a]);
          for (int u = 0; u < 4; u++) {
            const int64_t j = tile * TILE + 16 * u;
            const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(&products[(a * 4 + u) * 16])),
                                                 _mm512_mul_ps(s, _mm512_loadu_ps(scale + j)));
            const __m512 doubt = _mm512_fmadd_ps(en, _mm512_loadu_ps(norm + j), _mm512_mul_ps(el, _mm512_loadu_ps(lost + j)));
            const __m512 most = _mm512_add_ps(product, doubt);
            const __mmask16 keep = _mm512_cmp_ps_mask(most, bar, _CMP_GE_OQ);
            if (!keep) continue;
            const __m512i id = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                                _mm512_set1_epi32((int32_t)j));
            _mm512_storeu_ps(row.upper + row.m, _mm512_maskz_compress_ps(keep, most));
            const __m512 likely = _mm512_fnmadd_ps(_mm512_set1_ps(MARGIN), doubt, product);
            _mm512_storeu_ps(row.likely + row.m, _mm512_maskz_compress_ps(keep, likely));
            _mm512_storeu_si512(row.ids + row.m, _mm512_maskz_compress_epi32(keep, id));
            row.m += __builtin_popcount(keep);
          }
          if (row.m < row.prune_at) continue;
          row.raise_bar((int)k, keys.data());
          if (row.m < PLACES) continue;
          redo[first + r + a] = 1;
          row.m = 0, row.bar = std::numeric_limits<float>::infinity();
        }
      }
    }
    for (int r = 0; r < rows; r++) {
      rescored[first + r] = 0;
      if (redo[first + r]) continue;
      Doubts& row = doubts[r];
      const float* one = x + (first + r) * d;
      row.raise_bar((int)k, keys.data());
      // Products of about k latents first: the smallest of k exact ones is a bar that is no guess, and mostly a higher one.
      std::fill(scores.begin(), scores.begin() + row.m, -std::numeric_limits<float>::infinity());
      int some = 0;
      for (int i = 0; i < row.m; i++) {
        chosen[some] = i;
        some += row.likely[i] >= row.bar;
      }
      rescore(one, W, d, row.ids, chosen.data(), some, scores.data());
      for (int i = 0; i < some; i++) keys[i] = key_of(scores[chosen[i]]);
      const float bar = value_of(threshold(keys.data(), some, (int)k, 0));
      if (bar < row.bar) {
        redo[first + r] = 1;
        continue;
      }
      int more = 0;
      for (int i = 0; i < row.m; i++) {
        chosen[more] = i;
        more += row.likely[i] < row.bar && row.upper[i] >= bar;
      }
      rescore(one, W, d, row.ids, chosen.data(), more, scores.data());
      rescored[first + r] = some + more;
      select(scores.data(), row.ids, row.m, (int)k, keys.data(), values + (first + r) * k, indices + (first + r) * k);
    }
  }
}
#endif

// ---- decode ------------------------------------------------------------------------------------------------------------

void decode(const float* values, const int64_t* indices, const float* W, int64_t n_rows, int64_t k, int64_t d, float* out,
            int64_t* next) {
  const int64_t size = 16;
  for (int64_t block; take(next, blocks(n_rows, size), block);)
    for (int64_t r = block * size; r < std::min(n_rows, (block + 1) * size); r++)
      sum_rows(values + r * k, indices + r * k, k, W, d, out + r * d);
}

void dots(const int64_t* indices, const float* W, const float* rows, int64_t n_rows, int64_t k, int64_t d, float* out,
          int64_t* next) {
  const int64_t size = 16;
  for (int64_t block; take(next, blocks(n_rows, size), block);)
    for (int64_t r = block * size; r < std::min(n_rows, (block + 1) * size); r++)
      for (int64_t i = 0; i < k; i++) {
        if (i + 2 < k) prefetch(W + indices[r * k + i + 2] * d, d);
        out[r * k + i] = dot(rows + r * d, W + indices[r * k + i] * d, d);
      }
}

// error = resid - (sum_i values_i W[indices_i] + bias) * scale - shift, its squared norm, and its products with the k rows of W
// while they are near. `bias`, `shift` and `dots_out` may be null.
void decode_error(const float* values, const int64_t* indices, const float* W, const float* bias, const float* resid,
                  const float* shift, int64_t shift_layer, int64_t shift_token, int64_t shift_feature, const float* scale,
                  int64_t scale_layer, int64_t scale_token, int64_t n_layers, int64_t n_tokens, int64_t k, int64_t d,
                  float* error, double* squared, float* dots_out, int64_t* next) {
  const int64_t size = 16, n_rows = n_layers * n_tokens;
  std::vector<float> no_bias(d, 0.f), flat(d, 0.f);
  const float* b = bias ? bias : no_bias.data();
  for (int64_t block; take(next, blocks(n_rows, size), block);) {
    for (int64_t r = block * size; r < std::min(n_rows, (block + 1) * size); r++) {
      const int64_t layer = r / n_tokens, token = r % n_tokens;
      const float* s = flat.data();
      if (shift) {
        s = shift + layer * shift_layer + token * shift_token;
        if (!shift_feature) {
          std::fill(flat.begin(), flat.end(), *s);
          s = flat.data();
        }
      }
      const float a = scale[layer * scale_layer + token * scale_token];
      float* e = error + r * d;
      const float* x = resid + r * d;
      sum_rows(values + r * k, indices + r * k, k, W, d, e);
      for (int64_t c = 0; c < d; c++) e[c] = x[c] - ((e[c] + b[c]) * a + s[c]);
      squared[r] = dot(e, e, d);
      if (dots_out)
        for (int64_t i = 0; i < k; i++) dots_out[r * k + i] = dot(e, W + indices[r * k + i] * d, d);
    }
  }
}

// ---- gradients of the weights --------------------------------------------------------------------------------------------

// Counting sort of the pairs by latent: those of latent j are order[starts[j]..starts[j + 1]]. Pairs of weight 0 are left out.
// Returns how many are kept, or -1 if an index is out of range. One thread: it is a fraction of a per cent of a step.
int64_t sort_pairs(const int64_t* indices, const float* weights, int64_t n_pairs, int64_t n, int64_t* starts, int32_t* order) {
  std::fill(starts, starts + n + 1, 0);
  for (int64_t p = 0; p < n_pairs; p++) {
    if (indices[p] < 0 || indices[p] >= n) return -1;
    starts[indices[p] + 1] += weights[p] != 0.f;
  }
  for (int64_t j = 0; j < n; j++) starts[j + 1] += starts[j];
  for (int64_t p = 0; p < n_pairs; p++)
    if (weights[p] != 0.f) order[starts[indices[p]]++] = (int32_t)p;
  for (int64_t j = n; j > 0; j--) starts[j] = starts[j - 1];
  starts[0] = 0;
  return starts[n];
}

// gradient[j] = sum of weight * row over the pairs of latent j, and the sum of their weights.
void latent_gradient(const int64_t* starts, const int32_t* order, const float* weights, int64_t k, const float* rows, int64_t n,
                     int64_t d, float* gradient, float* sums, int64_t* next) {
  const int64_t size = 8;
  std::vector<float> w;
  std::vector<int32_t> row;
  for (int64_t block; take(next, blocks(n, size), block);) {
    for (int64_t j = block * size; j < std::min(n, (block + 1) * size); j++) {
      const int64_t m = starts[j + 1] - starts[j];
      const int32_t* pairs = order + starts[j];
      w.resize(m);
      row.resize(m);
      float s = 0;
      for (int64_t i = 0; i < m; i++) {
        row[i] = pairs[i] / (int32_t)k;
        w[i] = weights[pairs[i]];
        s += w[i];
      }
      sums[j] = s;
      sum_rows(w.data(), row.data(), m, rows, d, gradient + j * d);
    }
  }
}

// ---- the optimizer -------------------------------------------------------------------------------------------------------

// along[j] = <gradient, W> of row j where rows are `unit`, else 0, and the squared norm of what is left of the gradient.
void project(const float* W, const float* gradient, int64_t n, int64_t d, int64_t unit, float* along, double* squared,
             int64_t* next) {
  const int64_t size = 16;
  std::vector<float> left(d);
  for (int64_t block; take(next, blocks(n, size), block);) {
    for (int64_t j = block * size; j < std::min(n, (block + 1) * size); j++) {
      const float *w = W + j * d, *g = gradient + j * d;
      const float a = unit ? dot(g, w, d) : 0.f;
      for (int64_t c = 0; c < d; c++) left[c] = g[c] - a * w[c];
      along[j] = a;
      squared[j] = dot(left.data(), left.data(), d);
    }
  }
}

// Adam with the gradient (gradient - along * W) * factor, then rows of unit norm where they are `unit` (zero rows stay).
void adam(float* W, const float* gradient, float* mean, float* square, const float* along, int64_t n, int64_t d, int64_t unit,
          double factor, double step_size, double beta1, double beta2, double root_correction2, double eps, int64_t* next) {
  const int64_t size = 16;
  const float scale = (float)factor, of_mean = (float)(1 - beta1), keep = (float)beta2, of_square = (float)(1 - beta2);
  const float step = (float)step_size, root = (float)root_correction2, floor = (float)eps;
  for (int64_t block; take(next, blocks(n, size), block);) {
    for (int64_t j = block * size; j < std::min(n, (block + 1) * size); j++) {
      float *w = W + j * d, *m = mean + j * d, *v = square + j * d;
      const float* grad = gradient + j * d;
      const float a = along[j];
      for (int64_t c = 0; c < d; c++) {
        const float g = (grad[c] - a * w[c]) * scale;
        m[c] += of_mean * (g - m[c]);
        v[c] = keep * v[c] + of_square * g * g;
        w[c] -= step * m[c] / (std::sqrt(v[c]) / root + floor);
      }
      if (!unit) continue;
      const float norm = std::sqrt(dot(w, w, d));
      if (norm > 0)
        for (int64_t c = 0; c < d; c++) w[c] /= norm;
    }
  }
}

// ---- where in depth latents are active -----------------------------------------------------------------------------------

// Adds up the events of a code [layer, token, k]; analysis/events.py says what an event is, analysis/layers.py what each sum is. A
// token adds to the sums of its shard, and to those of its sequence: `firsts [sequence, latent]` the mean layers of events,
// `moments [sequence, 3]` their sum, that of their squares, and that of the mean squared layers. `twice` counts latents that a
// vector names twice, which are an error.
void depth(const double* values, const int64_t* indices, const int64_t* shard, const int64_t* sequence, int64_t n_layers,
           int64_t n_tokens, int64_t k, int64_t n, double* totals, double* shares, int64_t* counts, int64_t* persisted,
           double* within, double* effective_layers, int64_t* n_events, int64_t* active_layers, int64_t* longest_run,
           int64_t* runs, int64_t* first_layer, int64_t* last_layer, double* firsts, double* moments, int64_t* twice,
           int64_t* next) {
  std::vector<int32_t> event_of(n, -1), latent_of(n_layers * k), size_of(n_layers * k), layers(n_layers * k * n_layers);
  std::vector<double> zs(layers.size());
  for (int64_t block; take(next, 1, block);) {  // tokens share sums: one thread does all
    for (int64_t t = 0; t < n_tokens; t++) {
      int32_t found = 0;
      for (int64_t l = 0; l < n_layers; l++) {
        const int64_t row = (l * n_tokens + t) * k;
        for (int64_t i = row; i < row + k; i++) {
          if (!(values[i] > 0)) continue;
          int32_t& e = event_of[indices[i]];
          if (e < 0) e = found++, latent_of[e] = (int32_t)indices[i], size_of[e] = 0;
          int32_t& size = size_of[e];
          if (size && layers[e * n_layers + size - 1] == l) {
            ++*twice;
            continue;
          }
          layers[e * n_layers + size] = (int32_t)l, zs[e * n_layers + size] = values[i];
          size++;
        }
      }
      const int64_t by_layer = shard[t] * n_layers, q = sequence[t];
      for (int32_t e = 0; e < found; e++) {
        const int32_t *layer = &layers[e * n_layers], size = size_of[e];
        const double* z = &zs[e * n_layers];
        const int64_t j = latent_of[e], own = shard[t] * n + j;
        event_of[j] = -1;
        double mass = 0, mean = 0, variance = 0, entropy = 0, second = 0, first = 0;
        for (int32_t i = 0; i < size; i++) mass += z[i];
        int64_t run = 0, longest = 0;
        for (int32_t i = 0; i < size; i++) {
          const int64_t cell = (by_layer + layer[i]) * n + j;
          const double share = z[i] / mass, l = layer[i];
          const bool goes_on = i + 1 < size && layer[i + 1] == layer[i] + 1;
          totals[cell] += z[i], shares[cell] += share, counts[cell]++, persisted[cell] += goes_on;
          mean += share * l, first += l, second += l * l;
          if (size > 1) entropy -= share * std::log(share);
          run++;
          if (!goes_on) runs[by_layer + run - 1]++, longest = std::max(longest, run), run = 0;
        }
        for (int32_t i = 0; i < size; i++) variance += z[i] / mass * (layer[i] - mean) * (layer[i] - mean);
        double* spread = within + shard[t] * 3 * n + j;
        spread[0] += mass * variance, spread[n] += variance, spread[2 * n] += (size * second - first * first) / size;
        effective_layers[own] += std::exp(entropy), n_events[own]++;
        active_layers[by_layer + size - 1]++, longest_run[by_layer + longest - 1]++;
        first_layer[by_layer + layer[0]]++, last_layer[by_layer + layer[size - 1]]++;
        firsts[q * n + j] += mean;
        moments[3 * q] += mean, moments[3 * q + 1] += mean * mean, moments[3 * q + 2] += variance + mean * mean;
      }
    }
  }
}

}  // extern "C"
