/* CPU kernels of the engine: writing K and V into pages, and attention over pages.
 *
 * Why compiled: torch has no paged attention on the CPU. Gathering pages into dense tensors copies the whole
 * KV cache every step, and one call per sequence and layer costs more than the arithmetic (benchmarks/engine).
 *
 * Layout of one layer, with B = block_tokens, a multiple of 16 (LANES):
 *     K pages  [block][kv_head][head_dim][B]     keys are lanes: a score needs no reduction across lanes
 *     V pages  [block][kv_head][B][head_dim]
 * Elements are bfloat16 or float32; arithmetic is float32.
 *
 * Order of arithmetic: a (row, head) walks its keys in groups of 16 by absolute position, always with the
 * same operations. Its result therefore depends neither on the batch nor on how the prompt was chunked.
 *
 * Threads: work is cut into units taken from a shared counter. `gomp_parallel` is torch's own OpenMP entry,
 * handed in by Python, so that both share one pool instead of fighting for the cores; NULL runs serially.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define HEAD_DIM_MAX 256
#define TILE_STATES_MAX 48 /* (row, head) pairs that share one pass over the pages */

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2)));

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    const void *q;          /* [rows][heads][head_dim] */
    void *out;              /* like q */
    const void *k_pages, *v_pages;
    const int32_t *items;   /* [item_count][3]: first row, rows, position of the first row */
    const int32_t *tables;  /* block ids of all items, concatenated */
    const int64_t *table_offsets; /* [item_count] into tables */
    int64_t item_count, heads, kv_heads, head_dim, block_tokens;
    int64_t window;         /* keys a row sees, itself included; 0: all before it */
    float scale, softcap;   /* softcap 0: off */
    int32_t is_bf16;
} attend_args;

typedef struct {
    const attend_args *args;
    const int64_t *unit_starts; /* [item_count + 1] prefix sums of units */
    int64_t tile_rows;
    atomic_long next;
} attend_job;

static inline vec load(const void *base, int64_t index, int is_bf16) {
    if (!is_bf16) return *(const vec *)((const float *)base + index);
    hvec half = *(const hvec *)((const uint16_t *)base + index);
    ivec wide = __builtin_convertvector(half, ivec) << 16;
    return (vec)wide;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays one */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* e^x for x <= 0, relative error about 1e-7: x = n ln2 + r, |r| <= ln2/2, degree-6 polynomial in r. */
static inline vec exp_nonpositive(vec x) {
    const vec zero = {0};
    vec low = zero - 87.0f;
    ivec under = x < low;
    x = (vec)(((ivec)x & ~under) | ((ivec)low & under));
    vec n = x * 1.44269504f - 0.5f;
    n = __builtin_convertvector(__builtin_convertvector(n, ivec), vec); /* truncation rounds x <= 0 up */
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = zero + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec bits = (ivec)p + (__builtin_convertvector(n, ivec) << 23);
    return (vec)(bits & ~under);
}

static inline float reduce_max(vec x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

static inline float reduce_sum(vec x) {
    float part[8];
    for (int i = 0; i < 8; i++) part[i] = x[i] + x[i + 8];
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

typedef struct {
    float m, l;
} softmax_state;

/* One (row, head) takes in keys [low, high) of a group of 16. */
static inline void take_group(const float *q, const float *k, const float *v, float *acc, softmax_state *state,
                              int64_t head_dim, int low, int high, float softcap) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (int64_t d = 0; d < head_dim; d += 4) {
        s0 += q[d] * *(const vec *)(k + d * LANES);
        s1 += q[d + 1] * *(const vec *)(k + (d + 1) * LANES);
        s2 += q[d + 2] * *(const vec *)(k + (d + 2) * LANES);
        s3 += q[d + 3] * *(const vec *)(k + (d + 3) * LANES);
    }
    vec s = (s0 + s1) + (s2 + s3);
    if (softcap > 0.0f)
        for (int i = 0; i < LANES; i++) s[i] = softcap * tanhf(s[i] / softcap);
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec zero = {0};
    vec nothing = zero - INFINITY;
    ivec seen = (lane >= low) & (lane < high);
    s = (vec)(((ivec)s & seen) | ((ivec)nothing & ~seen));
    float m = reduce_max(s);
    m = m > state->m ? m : state->m;
    float keep = state->m == m ? 1.0f : expf(state->m - m);
    vec p = exp_nonpositive(s - m);
    state->l = state->l * keep + reduce_sum(p);
    state->m = m;
    float weight[LANES];
    *(vec *)weight = p;
    for (int64_t d = 0; d < head_dim; d += LANES) {
        vec a = *(vec *)(acc + d) * keep;
        for (int j = low; j < high; j++) a += weight[j] * *(const vec *)(v + j * head_dim + d);
        *(vec *)(acc + d) = a;
    }
}

/* Rows [row, row + rows) of one item under one KV head. */
static void attend_tile(const attend_args *a, int64_t item, int64_t kv_head, int64_t row, int64_t rows) {
    const int64_t dim = a->head_dim, group = a->heads / a->kv_heads, per_block = a->block_tokens;
    const int64_t first_row = a->items[item * 3], first_pos = a->items[item * 3 + 2];
    const int32_t *table = a->tables + a->table_offsets[item];
    const int64_t states = rows * group;
    static _Thread_local float q[TILE_STATES_MAX * HEAD_DIM_MAX] __attribute__((aligned(64)));
    static _Thread_local float acc[TILE_STATES_MAX * HEAD_DIM_MAX] __attribute__((aligned(64)));
    static _Thread_local float k[HEAD_DIM_MAX * LANES] __attribute__((aligned(64)));
    static _Thread_local float v[HEAD_DIM_MAX * LANES] __attribute__((aligned(64)));
    softmax_state soft[TILE_STATES_MAX];

    for (int64_t i = 0; i < states; i++) {
        int64_t at = ((first_row + row + i / group) * a->heads + kv_head * group + i % group) * dim;
        for (int64_t d = 0; d < dim; d += LANES) *(vec *)(q + i * dim + d) = load(a->q, at + d, a->is_bf16) * a->scale;
        memset(acc + i * dim, 0, dim * sizeof(float));
        soft[i] = (softmax_state){-INFINITY, 0.0f};
    }
    const int64_t low_pos = first_pos + row, high_pos = low_pos + rows; /* positions of these rows */
    int64_t first_key = a->window > 0 && low_pos >= a->window ? low_pos - a->window + 1 : 0;
    for (int64_t base = first_key / LANES * LANES; base < high_pos; base += LANES) {
        const int64_t block = table[base / per_block], slot = base % per_block;
        const int64_t k_at = (block * a->kv_heads + kv_head) * dim * per_block + slot;
        const int64_t v_at = ((block * a->kv_heads + kv_head) * per_block + slot) * dim;
        for (int64_t d = 0; d < dim; d++) *(vec *)(k + d * LANES) = load(a->k_pages, k_at + d * per_block, a->is_bf16);
        for (int64_t i = 0; i < LANES * dim; i += LANES) *(vec *)(v + i) = load(a->v_pages, v_at + i, a->is_bf16);
        for (int64_t i = 0; i < states; i++) {
            const int64_t pos = low_pos + i / group;
            int64_t low = a->window > 0 ? pos - a->window + 1 - base : 0, high = pos + 1 - base;
            low = low > 0 ? low : 0;
            high = high < LANES ? high : LANES;
            if (low < high) take_group(q + i * dim, k, v, acc + i * dim, &soft[i], dim, low, high, a->softcap);
        }
    }
    for (int64_t i = 0; i < states; i++) {
        int64_t at = ((first_row + row + i / group) * a->heads + kv_head * group + i % group) * dim;
        float inverse = 1.0f / soft[i].l;
        for (int64_t d = 0; d < dim; d++) {
            float value = acc[i * dim + d] * inverse;
            if (a->is_bf16) ((uint16_t *)a->out)[at + d] = to_bf16(value);
            else ((float *)a->out)[at + d] = value;
        }
    }
}

static void attend_worker(void *data) {
    attend_job *job = data;
    const attend_args *a = job->args;
    int64_t item = 0;
    for (;;) {
        int64_t unit = atomic_fetch_add(&job->next, 1);
        if (unit >= job->unit_starts[a->item_count]) return;
        while (unit >= job->unit_starts[item + 1]) item++;
        int64_t within = unit - job->unit_starts[item];
        int64_t row = within / a->kv_heads * job->tile_rows, rows = a->items[item * 3 + 1] - row;
        attend_tile(a, item, within % a->kv_heads, row, rows < job->tile_rows ? rows : job->tile_rows);
    }
}

/* Attention of every row over the pages of its sequence. Returns 0, or 1 where the shape is not supported. */
int penstock_attend(const attend_args *a, parallel_fn gomp_parallel, int threads) {
    const int64_t group = a->heads / a->kv_heads;
    if (a->head_dim > HEAD_DIM_MAX || a->head_dim % LANES || a->block_tokens % LANES || group > TILE_STATES_MAX) return 1;
    int64_t *starts = malloc((a->item_count + 1) * sizeof(int64_t));
    if (!starts) return 1;
    attend_job job = {.args = a, .unit_starts = starts, .tile_rows = TILE_STATES_MAX / group};
    starts[0] = 0;
    for (int64_t i = 0; i < a->item_count; i++) {
        int64_t tiles = (a->items[i * 3 + 1] + job.tile_rows - 1) / job.tile_rows;
        starts[i + 1] = starts[i] + tiles * a->kv_heads;
    }
    atomic_init(&job.next, 0);
    if (gomp_parallel && threads > 1 && starts[a->item_count] > 1) gomp_parallel(attend_worker, &job, threads, 0);
    else attend_worker(&job);
    free(starts);
    return 0;
}

/* Put each row's K and V where its block table says. k, v: [rows][kv_heads][head_dim], 2 or 4 bytes an element. */
void penstock_store(const void *k, const void *v, void *k_pages, void *v_pages, const int64_t *slots, int64_t rows,
                    int64_t kv_heads, int64_t head_dim, int64_t block_tokens, int32_t element_bytes) {
    for (int64_t r = 0; r < rows; r++) {
        const int64_t block = slots[r] / block_tokens, slot = slots[r] % block_tokens;
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t from = (r * kv_heads + h) * head_dim;
            const int64_t k_to = (block * kv_heads + h) * head_dim * block_tokens + slot;
            const int64_t v_to = ((block * kv_heads + h) * block_tokens + slot) * head_dim;
            if (element_bytes == 2)
                for (int64_t d = 0; d < head_dim; d++)
                    ((uint16_t *)k_pages)[k_to + d * block_tokens] = ((const uint16_t *)k)[from + d];
            else
                for (int64_t d = 0; d < head_dim; d++)
                    ((uint32_t *)k_pages)[k_to + d * block_tokens] = ((const uint32_t *)k)[from + d];
            memcpy((char *)v_pages + v_to * element_bytes, (const char *)v + from * element_bytes,
                   head_dim * element_bytes);
        }
    }
}
