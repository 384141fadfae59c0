/* A few tokens through a GPT: what model/gpt.py computes with a KV cache, in one call and without PyTorch.

   A token of a small model takes PyTorch some hundred operations, each of which costs more to begin than to
   compute. Here all threads go through the layers together and wait for each other five times in each; the
   time is that in which the weights are read. step.py fills the structs and has the checks; each function is
   a formula of gpt.py, which explains it. Weights are float32, bfloat16 or int8, numbers between them float32.

   Shapes: N tokens of B rows, C width, V vocab_size, H heads, K heads of keys and values, D head_dim,
           R rows and S length of the cache */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum Dtype { FLOAT32, BFLOAT16, INT8 };
enum Activation { GELU, GELU_TANH, RELU2, SWIGLU, TANH }; /* TANH: of the logits' cap */

typedef struct {
    const void *weight;  /* (outputs, inputs) */
    const float *scale;  /* (outputs,) of int8, else NULL */
    const float *bias;   /* (outputs,) or NULL */
    int64_t outputs, inputs, dtype;
} Linear;

typedef struct {
    const float *gain;  /* NULL: there is no norm */
    const float *bias;  /* NULL: none */
    int64_t centered;   /* whether it subtracts the mean: LayerNorm does, RMSNorm does not */
    double eps;
} Norm;

typedef struct {
    Norm norm_1, q_norm, k_norm, norm_2;
    Linear qkv, attn_proj, fc, up, mlp_proj; /* up: without a weight unless the MLP is gated */
} Block;

typedef struct {
    int64_t width, vocab_size, block_size, heads, kv_heads, head_dim, hidden, layers, activation;
    int64_t pair_rows, triple_rows, exact_pairs, pairs_fit; /* of the n-gram tables */
    int64_t rotation_length;
    double logit_cap;
    const float *tokens, *positions, *pairs, *triples; /* embeddings, (rows, C); NULL where there is none */
    const float *rotation;                             /* of RoPE, (2, rotation_length, D / 2), or NULL */
    const Block *blocks;
    Norm final_norm;
    Linear head;
} Model;

typedef struct {
    int64_t rows_of_step, tokens_of_row; /* B, T; N = B T */
    const int64_t *tokens;               /* (B, 2 + T): after the two before them, -1 where a text begins */
    const int64_t *rows;                 /* (B,): the row of the cache that each belongs to */
    const int64_t *positions;            /* (B, T): their places in the text */
    float *keys, *values;                /* the cache, (layers, R, K, S, D) each */
    int64_t cache_rows, length;          /* R, S */
    float *logits;                       /* out: (B, T, V) */
    int64_t long_waits;                  /* out: waits of a thread for others that took longer than usual */
} Step;

/* What step.py must have, too: it may be older, if this file was exchanged while a training ran. */
const int64_t struct_bytes[] = {sizeof(Model), sizeof(Block), sizeof(Step)};

/* --- threads --- */

typedef struct {
    atomic_int arrived, round, long_waits;
    int threads;
} Barrier;

#define LOOKS 2000 /* in a wait, before it counts as long: some 50 microseconds */

/* Waits until all threads are here. Short waits are the rule, so it looks for them before it yields. */
static void wait_for_all(Barrier *barrier) {
    int round = atomic_load(&barrier->round);
    if (atomic_fetch_add(&barrier->arrived, 1) + 1 == barrier->threads) {
        atomic_store(&barrier->arrived, 0);
        atomic_fetch_add(&barrier->round, 1);
        return;
    }
    for (int looks = 0; atomic_load(&barrier->round) == round; looks++) {
        if (looks == LOOKS) atomic_fetch_add(&barrier->long_waits, 1);
        if (looks >= LOOKS) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause(); /* leaves the core to its other thread */
#endif
    }
}

typedef struct {
    int number, threads;
    float *normed, *scores, *wide, *turned; /* its own room: (N, C), (S,), (UNIT, inputs), (inputs, P) */
} Thread;

typedef struct {
    int64_t first, end;
} Range;

/* The part of `count` things that is a thread's. */
static Range part(int64_t count, const Thread *thread) {
    return (Range){count * thread->number / thread->threads, count * (thread->number + 1) / thread->threads};
}

/* --- formulas --- */

#define UNIT 8 /* numbers that are computed side by side */

static inline float wide_float(float x) { return x; }
static inline float wide_int8(int8_t x) { return (float)x; }
static inline float wide_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* exp(x) to 3e-7 of itself near 0 and 5e-6 at -72, without a branch, so that compilers make vectors of it.
   x = (n + f) ln 2. Not a number counts as -87. */
static inline float fast_exp(float x) {
    x = x > -87 ? x : -87;
    x = x < 88 ? x : 88;
    float n = rintf(x * 1.44269504f), f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1 + f + f * f * (0.5f + f * (0.16666667f + f * (0.041666f + f * (0.0083334f + f * 0.0013981f))));
    uint32_t power = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

static inline float fast_tanh(float x) { return 1 - 2 / (fast_exp(2 * x) + 1); }

/* erf(x) to 6e-7 (Abramowitz & Stegun, 7.1.26). */
static inline float fast_erf(float x) {
    float t = 1 / (1 + 0.3275911f * fabsf(x));
    float y = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1 - y * fast_exp(-x * x), x);
}

static void activate_unit(int64_t activation, float x[UNIT]) {
    if (activation == GELU)
        for (int i = 0; i < UNIT; i++) x[i] = 0.5f * x[i] * (1 + fast_erf(x[i] * 0.70710678f));
    if (activation == GELU_TANH)
        for (int i = 0; i < UNIT; i++)
            x[i] = 0.5f * x[i] * (1 + fast_tanh(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    if (activation == RELU2)
        for (int i = 0; i < UNIT; i++) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
    if (activation == SWIGLU) /* its gate */
        for (int i = 0; i < UNIT; i++) x[i] = x[i] / (1 + fast_exp(-x[i]));
    if (activation == TANH)
        for (int i = 0; i < UNIT; i++) x[i] = fast_tanh(x[i]);
}

/* Compilers round the last numbers of a loop otherwise than its vectors, so all come in vectors: the result is
   the same for any number of threads. */
static void activate(int64_t activation, float *x, int64_t count) {
    for (; count > 0; x += UNIT, count -= UNIT) {
        float unit[UNIT] = {0};
        size_t bytes = (size_t)(count < UNIT ? count : UNIT) * sizeof(float);
        memcpy(unit, x, bytes);
        activate_unit(activation, unit);
        memcpy(x, unit, bytes);
    }
}

/* --- linear layers: UNIT outputs at a time, so that sums hide the time that one takes --- */

#define FEW 5 /* So many vectors are multiplied one after the other, more of them LANES at a time. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Half of a unit's rows of a weight times a vector. */
#define FOUR_DOTS(NAME, TYPE, WIDE)                                                          \
    static void NAME(const TYPE *const w[4], const float *x, int64_t inputs, float sums[4]) { \
        const TYPE *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];                           \
        float a = 0, b = 0, c = 0, d = 0;                                                    \
        for (int64_t i = 0; i < inputs; i++) {                                               \
            a += WIDE(w0[i]) * x[i];                                                         \
            b += WIDE(w1[i]) * x[i];                                                         \
            c += WIDE(w2[i]) * x[i];                                                         \
            d += WIDE(w3[i]) * x[i];                                                         \
        }                                                                                    \
        sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;                                  \
    }
FOUR_DOTS(dots_float32, float, wide_float)
FOUR_DOTS(dots_bfloat16, uint16_t, wide_bfloat16)
FOUR_DOTS(dots_int8, int8_t, wide_int8)

/* A unit's rows of a weight times LANES vectors: x (inputs, P), of which it takes LANES columns -> (UNIT, LANES). */
static void many_dots(const float *const w[UNIT], const float *x, int64_t P, int64_t inputs, float *sums) {
    Lanes sum[UNIT] = {0};
    for (int64_t i = 0; i < inputs; i++) {
        Lanes column = *(const Lanes *)(x + i * P);
        for (int j = 0; j < UNIT; j++) sum[j] += w[j][i] * column;
    }
    memcpy(sums, sum, sizeof sum);
}

/* The number of vectors, rounded up to whole lanes. */
static int64_t padded(int64_t N) { return (N + LANES - 1) / LANES * LANES; }

/* x (N, inputs) -> turned (inputs, P): each number beside those of the other vectors; zeros behind them. */
static void turn(const float *x, int64_t N, int64_t inputs, float *turned) {
    int64_t P = padded(N);
    memset(turned, 0, inputs * P * sizeof(float));
    for (int64_t first = 0; first < inputs; first += LANES)
        for (int64_t n = 0; n < N; n++)
            for (int64_t i = first; i < first + LANES && i < inputs; i++) turned[i * P + n] = x[n * inputs + i];
}

/* A row of a weight in float32; `room` for it if it is not. */
static const float *wide_row(const Linear *l, int64_t row, float *room) {
    int64_t inputs = l->inputs;
    if (l->dtype == FLOAT32) return (const float *)l->weight + row * inputs;
    const uint16_t *half = (const uint16_t *)l->weight + row * inputs;
    const int8_t *byte = (const int8_t *)l->weight + row * inputs;
    if (l->dtype == BFLOAT16)
        for (int64_t i = 0; i < inputs; i++) room[i] = wide_bfloat16(half[i]);
    else
        for (int64_t i = 0; i < inputs; i++) room[i] = wide_int8(byte[i]);
    return room;
}

/* A unit of outputs, their rows given, of one vector. */
static void unit_of_one(const Linear *l, const int64_t row[UNIT], const float *x, float sums[UNIT]) {
    for (int j = 0; j < UNIT; j += 4) {
#define ROWS(TYPE)                                                                                         \
    (const TYPE *const[4]) {                                                                               \
        (const TYPE *)l->weight + row[j] * l->inputs, (const TYPE *)l->weight + row[j + 1] * l->inputs,    \
        (const TYPE *)l->weight + row[j + 2] * l->inputs, (const TYPE *)l->weight + row[j + 3] * l->inputs \
    }
        if (l->dtype == FLOAT32) dots_float32(ROWS(float), x, l->inputs, sums + j);
        if (l->dtype == BFLOAT16) dots_bfloat16(ROWS(uint16_t), x, l->inputs, sums + j);
        if (l->dtype == INT8) dots_int8(ROWS(int8_t), x, l->inputs, sums + j);
    }
}

enum Use { SET, ADD, MULTIPLY };

/* A thread's part of a linear layer: x (N, inputs) -> y (N, outputs), which it sets, adds to or multiplies. */
static void linear(const Linear *l, const float *x, float *y, int64_t N, enum Use use, const Thread *thread) {
    Range mine = part((l->outputs + UNIT - 1) / UNIT, thread);
    int64_t row[UNIT], width = N <= FEW ? 1 : LANES;
    float sums[UNIT * LANES];
    const float *w[UNIT];
    if (N > FEW) turn(x, N, l->inputs, thread->turned);
    for (int64_t o = UNIT * mine.first; o < UNIT * mine.end; o += UNIT) {
        for (int j = 0; j < UNIT; j++) { /* where there are fewer rows, the last again */
            row[j] = o + j < l->outputs ? o + j : l->outputs - 1;
            if (N > FEW) w[j] = wide_row(l, row[j], thread->wide + j * l->inputs);
        }
        for (int64_t first = 0; first < N; first += width) {
            if (N <= FEW) unit_of_one(l, row, x + first * l->inputs, sums);
            else many_dots(w, thread->turned + first, padded(N), l->inputs, sums);
            for (int64_t j = 0; j < UNIT && o + j < l->outputs; j++) {
                float scale = l->scale ? l->scale[o + j] : 1, bias = l->bias ? l->bias[o + j] : 0;
                for (int64_t n = first; n < N && n < first + width; n++) {
                    float *out = y + n * l->outputs + o + j, sum = sums[j * width + n - first] * scale + bias;
                    *out = use == SET ? sum : use == ADD ? *out + sum : *out * sum;
                }
            }
        }
    }
}

/* --- the parts of a block --- */

/* Normalizes `count` vectors x (count, width) into y, which may be x. */
static void normalize(const Norm *norm, const float *x, float *y, int64_t count, int64_t width) {
    for (int64_t n = 0; n < count; n++, x += width, y += width) {
        float mean = 0, square = 0;
        if (norm->centered) {
            for (int64_t i = 0; i < width; i++) mean += x[i];
            mean /= width;
        }
        for (int64_t i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
        float scale = 1 / sqrtf(square / width + (float)norm->eps);
        for (int64_t i = 0; i < width; i++)
            y[i] = (x[i] - mean) * scale * norm->gain[i] + (norm->bias ? norm->bias[i] : 0);
    }
}

static void rotate(const Model *m, float *x, int64_t position) {
    int64_t half = m->head_dim / 2;
    const float *cosine = m->rotation + position * half, *sine = cosine + m->rotation_length * half;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

static int64_t hashed(int64_t key) { return (int64_t)((uint64_t)key * 0x9E3779B97F4A7C1u) >> 24; }

static int64_t row_of(int64_t key, int64_t rows) { return (key % rows + rows) % rows; }

/* Adds the rows of the n-gram tables (model/ngram.py) for a token and the two before it. */
static void add_ngrams(const Model *m, const int64_t ids[3], float *x) {
    int64_t oldest = ids[0] + 1, last = ids[1] + 1, current = ids[2] + 1, pair, triple, V = m->vocab_size;
    if (m->exact_pairs) {
        pair = last * V + current - 1;
        triple = hashed(oldest * (V + 1) * V + pair);
        pair = m->pairs_fit ? pair : hashed(pair);
    } else {
        pair = 48271 * last + 69621 * current;
        triple = 39373 * oldest + 40692 * pair;
    }
    const float *a = m->pairs + row_of(pair, m->pair_rows) * m->width;
    const float *b = m->triples + row_of(triple, m->triple_rows) * m->width;
    for (int64_t i = 0; i < m->width; i++) x[i] += a[i] + b[i];
}

static void embed(const Model *m, const Step *step, int64_t n, float *x) {
    int64_t T = step->tokens_of_row;
    const int64_t *ids = step->tokens + n / T * (2 + T) + n % T; /* the token is the third */
    memcpy(x, m->tokens + ids[2] * m->width, m->width * sizeof(float));
    if (m->positions)
        for (int64_t i = 0; i < m->width; i++) x[i] += m->positions[step->positions[n] * m->width + i];
    if (m->pairs) add_ngrams(m, ids, x);
}

/* Keys and values of a token for one of the K heads, into the cache. */
static void store(const Model *m, const Block *block, const Step *step, int64_t n, int64_t head, float *qkv,
                  float *keys, float *values) {
    int64_t D = m->head_dim;
    float *k = qkv + (m->heads + head) * D, *v = k + m->kv_heads * D;
    if (block->k_norm.gain) normalize(&block->k_norm, k, k, 1, D);
    if (m->rotation) rotate(m, k, step->positions[n]);
    memcpy(keys + step->positions[n] * D, k, D * sizeof(float));
    memcpy(values + step->positions[n] * D, v, D * sizeof(float));
}

/* What a query gathers from the tokens up to its own. scores: room for as many. */
static void attend(const Model *m, const float *q, int64_t position, const float *keys, const float *values,
                   float *scores, float *y) {
    int64_t D = m->head_dim;
    float highest = -INFINITY, total = 0, scale = 1 / sqrtf((float)D);
    for (int64_t s = 0; s <= position; s++) {
        float sum = 0;
        for (int64_t i = 0; i < D; i++) sum += q[i] * keys[s * D + i];
        scores[s] = sum * scale;
        highest = scores[s] > highest ? scores[s] : highest;
    }
    for (int64_t s = 0; s <= position; s++) total += scores[s] = fast_exp(scores[s] - highest);
    memset(y, 0, D * sizeof(float));
    for (int64_t s = 0; s <= position; s++) {
        float weight = scores[s] / total;
        for (int64_t i = 0; i < D; i++) y[i] += weight * values[s * D + i];
    }
}

/* A thread's part of the attention of all tokens: it has some of the K heads, and the queries that use them. */
static void attention(const Model *m, const Block *block, const Step *step, int64_t layer, float *qkv, float *y,
                      const Thread *thread) {
    int64_t D = m->head_dim, group = m->heads / m->kv_heads, width = (m->heads + 2 * m->kv_heads) * D;
    int64_t N = step->rows_of_step * step->tokens_of_row;
    Range mine = part(m->kv_heads, thread);
    for (int64_t head = mine.first; head < mine.end; head++)
        for (int pass = 0; pass < 2; pass++) /* first all keys: a token may look at those of the same step */
            for (int64_t n = 0; n < N; n++) {
                int64_t row = (layer * step->cache_rows + step->rows[n / step->tokens_of_row]) * m->kv_heads + head;
                float *keys = step->keys + row * step->length * D, *values = step->values + row * step->length * D;
                if (pass == 0) {
                    store(m, block, step, n, head, qkv + n * width, keys, values);
                    continue;
                }
                for (int64_t h = head * group; h < (head + 1) * group; h++) {
                    float *q = qkv + n * width + h * D;
                    if (block->q_norm.gain) normalize(&block->q_norm, q, q, 1, D);
                    if (m->rotation) rotate(m, q, step->positions[n]);
                    attend(m, q, step->positions[n], keys, values, thread->scores, y + (n * m->heads + h) * D);
                }
            }
}

/* --- the step --- */

typedef struct {
    float *x, *qkv, *attended, *hidden; /* of all threads: (N, C), (N, (H + 2 K) D), (N, H D), (N, hidden) */
} Shared;

/* What each thread does. Where it waits, the next line needs what the others have computed. */
static void run(const Model *m, const Step *step, const Shared *s, const Thread *thread, Barrier *barrier) {
    int64_t N = step->rows_of_step * step->tokens_of_row, C = m->width;
    Range mine = part(N, thread);
    for (int64_t n = mine.first; n < mine.end; n++) embed(m, step, n, s->x + n * C);
    wait_for_all(barrier);
    for (int64_t layer = 0; layer < m->layers; layer++) {
        const Block *block = m->blocks + layer;
        normalize(&block->norm_1, s->x, thread->normed, N, C);
        linear(&block->qkv, thread->normed, s->qkv, N, SET, thread);
        wait_for_all(barrier);
        attention(m, block, step, layer, s->qkv, s->attended, thread);
        wait_for_all(barrier);
        linear(&block->attn_proj, s->attended, s->x, N, ADD, thread);
        wait_for_all(barrier);
        normalize(&block->norm_2, s->x, thread->normed, N, C);
        linear(&block->fc, thread->normed, s->hidden, N, SET, thread);
        mine = part((m->hidden + UNIT - 1) / UNIT, thread); /* those that linear has computed */
        int64_t first = UNIT * mine.first, end = UNIT * mine.end < m->hidden ? UNIT * mine.end : m->hidden;
        for (int64_t n = 0; n < N; n++) activate(m->activation, s->hidden + n * m->hidden + first, end - first);
        if (block->up.weight) linear(&block->up, thread->normed, s->hidden, N, MULTIPLY, thread);
        wait_for_all(barrier);
        linear(&block->mlp_proj, s->hidden, s->x, N, ADD, thread);
        wait_for_all(barrier);
    }
    normalize(&m->final_norm, s->x, thread->normed, N, C);
    linear(&m->head, thread->normed, step->logits, N, SET, thread);
    wait_for_all(barrier);
    if (m->logit_cap == 0) return;
    float *logits = step->logits, cap = (float)m->logit_cap;
    mine = part(N * m->vocab_size, thread);
    for (int64_t i = mine.first; i < mine.end; i++) logits[i] /= cap;
    activate(TANH, logits + mine.first, mine.end - mine.first);
    for (int64_t i = mine.first; i < mine.end; i++) logits[i] *= cap;
}

/* Whether all tokens, and their places, are within the tables. */
static int is_valid(const Model *m, const Step *step) {
    int64_t T = step->tokens_of_row, N = step->rows_of_step * T;
    for (int64_t n = 0; n < N; n++) {
        int64_t id = step->tokens[n / T * (2 + T) + n % T + 2], position = step->positions[n];
        if (id < 0 || id >= m->vocab_size || position < 0 || position >= m->block_size) return 0;
        if (position >= step->length) return 0;
    }
    return 1;
}

/* Computes a step. Returns 0; 1 if there is no memory; 2 if a token or its place does not exist. */
int decode_step(const Model *m, Step *step, int threads) {
    if (!is_valid(m, step)) return 2;
    int64_t N = step->rows_of_step * step->tokens_of_row, C = m->width;
    int64_t heads = m->heads * m->head_dim, qkv = heads + 2 * m->kv_heads * m->head_dim;
    int64_t widest = m->hidden > C ? m->hidden : C; /* inputs of a linear layer */
    widest = widest > heads ? widest : heads;
    int64_t own = N * C + step->length + widest * (UNIT + padded(N)) + 16; /* 16: 64 bytes between threads */
    float *memory = malloc((N * (C + heads + qkv + m->hidden) + threads * own) * sizeof(float));
    if (!memory) return 1;
    float *attended = memory + N * C, *hidden = attended + N * heads;
    Shared shared = {.x = memory, .attended = attended, .hidden = hidden, .qkv = hidden + N * m->hidden};
    Barrier barrier = {.threads = 1};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        Thread thread = {.threads = 1};
#ifdef _OPENMP
#pragma omp single
        barrier.threads = omp_get_num_threads();
        thread.number = omp_get_thread_num();
        thread.threads = barrier.threads;
#endif
        thread.normed = shared.qkv + N * qkv + thread.number * own;
        thread.scores = thread.normed + N * C;
        thread.wide = thread.scores + step->length;
        thread.turned = thread.wide + UNIT * widest;
        run(m, step, &shared, &thread, &barrier);
    }
    free(memory);
    step->long_waits = atomic_load(&barrier.long_waits);
    return 0;
}
