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

static inline vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

static inline float reduce_max(vec x) {
    x = larger(x, __builtin_shuffle(x, (ivec){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    x = larger(x, __builtin_shuffle(x, (ivec){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    x = larger(x, __builtin_shuffle(x, (ivec){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    return x[0] > x[1] ? x[0] : x[1];
}

static inline float reduce_sum(vec x) {
    x += __builtin_shuffle(x, (ivec){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    x += __builtin_shuffle(x, (ivec){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    x += __builtin_shuffle(x, (ivec){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return x[0] + x[1];
}

typedef struct {
    float m, l; /* running maximum, and sum of weights relative to it */
} softmax_state;

/* 16 keys and values at once, under one KV head: bf16 in the page, or float32 copied from it. */
typedef struct {
    const void *k, *v;
    int64_t k_stride; /* elements from one feature of the keys to the next */
} key_group;

/* The `heads` query heads of one row take in keys [low, high) of a group. `heads`, `wide` (64 features at a
 * time) and `is_bf16` are constants where this is inlined; they change no result, only what stays in registers. */
static inline __attribute__((always_inline)) void take_group(const int heads, const int is_bf16, const int wide,
                                                             const key_group *keys, const float *q, float *acc,
                                                             softmax_state *state, int64_t dim, int low, int high,
                                                             float softcap) {
    const vec zero = {0};
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const ivec seen = (lane >= low) & (lane < high);
    vec part[heads][4];
    float weight[heads][LANES], keep[heads];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < 4; i++) part[h][i] = zero;
    for (int64_t d = 0; d < dim; d += 4)
        for (int i = 0; i < 4; i++) {
            vec k = load(keys->k, (d + i) * keys->k_stride, is_bf16);
            for (int h = 0; h < heads; h++) part[h][i] += q[h * dim + d + i] * k;
        }
    for (int h = 0; h < heads; h++) {
        vec s = (part[h][0] + part[h][1]) + (part[h][2] + part[h][3]);
        if (softcap > 0.0f)
            for (int i = 0; i < LANES; i++) s[i] = softcap * tanhf(s[i] / softcap);
        s = (vec)(((ivec)s & seen) | ((ivec)(zero - INFINITY) & ~seen));
        float m = reduce_max(s);
        m = m > state[h].m ? m : state[h].m;
        keep[h] = state[h].m == m ? 1.0f : expf(state[h].m - m);
        vec p = exp_nonpositive(s - m);
        state[h].l = state[h].l * keep[h] + reduce_sum(p);
        state[h].m = m;
        *(vec *)weight[h] = p;
    }
    const int chunks = wide ? 4 : 1;
    for (int64_t d = 0; d < dim; d += chunks * LANES) {
        vec a[heads][chunks];
        for (int h = 0; h < heads; h++)
            for (int c = 0; c < chunks; c++) a[h][c] = *(vec *)(acc + h * dim + d + c * LANES) * keep[h];
        for (int j = low; j < high; j++)
            for (int c = 0; c < chunks; c++) {
                vec v = load(keys->v, j * dim + d + c * LANES, is_bf16);
                for (int h = 0; h < heads; h++) a[h][c] += weight[h][j] * v;
            }
        for (int h = 0; h < heads; h++)
            for (int c = 0; c < chunks; c++) *(vec *)(acc + h * dim + d + c * LANES) = a[h][c];
    }
}

/* One row, all its query heads under one KV head, `group` of them, a few at a time. */
static inline __attribute__((always_inline)) void take_group_row(const int is_bf16, const int wide, int64_t group,
                                                                 const key_group *keys, const float *q, float *acc,
                                                                 softmax_state *state, int64_t dim, int low, int high,
                                                                 float softcap) {
    int64_t h = 0;
    for (; h + 3 <= group; h += 3)
        take_group(3, is_bf16, wide, keys, q + h * dim, acc + h * dim, state + h, dim, low, high, softcap);
    for (; h + 2 <= group; h += 2)
        take_group(2, is_bf16, wide, keys, q + h * dim, acc + h * dim, state + h, dim, low, high, softcap);
    for (; h < group; h++)
        take_group(1, is_bf16, wide, keys, q + h * dim, acc + h * dim, state + h, dim, low, high, softcap);
}

/* Rows [row, row + rows) of one item under one KV head. */
static void attend_tile(const attend_args *a, int64_t item, int64_t kv_head, int64_t row, int64_t rows) {
    const int64_t dim = a->head_dim, group = a->heads / a->kv_heads, per_block = a->block_tokens;
    const int64_t first_row = a->items[item * 3], first_pos = a->items[item * 3 + 2];
    const int32_t *table = a->tables + a->table_offsets[item];
    const int64_t states = rows * group;
    const int is_wide = dim % (4 * LANES) == 0;
    const int element_bytes = a->is_bf16 ? 2 : 4;
    /* A single row reads bf16 straight from the page; several share one copy in float32. */
    const int copies = a->is_bf16 && rows > 1, reads_bf16 = a->is_bf16 && !copies;
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
        key_group keys = {(const char *)a->k_pages + k_at * element_bytes,
                          (const char *)a->v_pages + v_at * element_bytes, per_block};
        if (copies) {
            for (int64_t d = 0; d < dim; d++) *(vec *)(k + d * LANES) = load(keys.k, d * per_block, 1);
            for (int64_t i = 0; i < LANES * dim; i += LANES) *(vec *)(v + i) = load(keys.v, i, 1);
            keys = (key_group){k, v, LANES};
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t pos = low_pos + r;
            int64_t low = a->window > 0 ? pos - a->window + 1 - base : 0, high = pos + 1 - base;
            low = low > 0 ? low : 0;
            high = high < LANES ? high : LANES;
            if (low >= high) continue;
            float *row_q = q + r * group * dim, *row_acc = acc + r * group * dim;
            softmax_state *row_soft = soft + r * group;
            if (reads_bf16 && is_wide)
                take_group_row(1, 1, group, &keys, row_q, row_acc, row_soft, dim, low, high, a->softcap);
            else if (reads_bf16)
                take_group_row(1, 0, group, &keys, row_q, row_acc, row_soft, dim, low, high, a->softcap);
            else if (is_wide)
                take_group_row(0, 1, group, &keys, row_q, row_acc, row_soft, dim, low, high, a->softcap);
            else
                take_group_row(0, 0, group, &keys, row_q, row_acc, row_soft, dim, low, high, a->softcap);
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
