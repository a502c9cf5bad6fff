/* SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inputs.h"
#include "method_layer.h"

const char *const order_names[ORDERS] = {"auto", "factors", "dy", "x", "out-in", "in-out"};

static const double WORTH_TIMING = 2; /* times the smallest cost */

int is_asked(const layer *l, int method)
{
    return l->asked->methods >> method & 1;
}

void succeed(const layer *l, sebp_status status)
{
    if (status != SEBP_SUCCESS) {
        die(FAILED, "%s: %s: %s", l->sizes->name, sebp_status_string(status),
            sebp_context_message(l->context));
    }
}

static void choose_sizes(layer *l)
{
    const shape *s = l->sizes;
    double elements = (double)s->n * (double)s->k;
    l->active = (int64_t)(l->activity * (double)s->m + 0.5);
    l->active = l->active < 1 ? 1 : l->active;
    l->k = (int64_t)(l->asked->kept * elements + 0.5);
    l->k = l->k < 1 ? 1 : l->k;
    l->rank = (l->k + (s->n + s->k) / 2) / (s->n + s->k);
    l->rank = l->rank < 1 ? 1 : l->rank;
    l->scale = 2; /* as is usual: alpha is twice the rank */
    l->adamw = (sebp_adamw_options)SEBP_ADAMW_OPTIONS_INIT;
    l->adamw.learning_rate = 0.1; /* so that a bf16 weight moves */
}

void place_inputs(layer *l)
{
    choose_sizes(l);
    int64_t m = l->sizes->m, n = l->sizes->n, k = l->sizes->k, r = l->rank, basis_rank;
    basis_rank = l->asked->basis_rank > 0 ? l->asked->basis_rank : INT64_MAX;
    int64_t r_out = basis_rank < n ? basis_rank : n, r_in = basis_rank < k ? basis_rank : k;
    const struct {
        int64_t rows, cols;
        int method; /* that needs it; METHODS: all */
        sebp_dtype dtype;
    } all[MATRICES] = {
        [X] = {m, k, METHODS, l->dtype},
        [W] = {n, k, METHODS, l->dtype},
        [BIAS] = {1, n, METHODS, SEBP_F32},
        [Y] = {m, n, METHODS, l->dtype},
        [DY] = {m, n, METHODS, l->dtype},
        [DX] = {m, k, METHODS, l->dtype},
        [DB] = {1, n, METHODS, SEBP_F32},
        [DW] = {n, k, FULL, SEBP_F32},
        [V1] = {n, k, FULL, SEBP_F32},
        [V2] = {n, k, FULL, SEBP_F32},
        [A] = {k, r, LORA, l->dtype},
        [DA] = {k, r, LORA, SEBP_F32},
        [A1] = {k, r, LORA, SEBP_F32},
        [A2] = {k, r, LORA, SEBP_F32},
        [B] = {r, n, LORA, l->dtype},
        [LORA_DB] = {r, n, LORA, SEBP_F32},
        [B1] = {r, n, LORA, SEBP_F32},
        [B2] = {r, n, LORA, SEBP_F32},
        [H] = {l->active, r, LORA, l->dtype},
        [DH] = {l->active, r, LORA, l->dtype},
        [U_OUT] = {r_out, n, SPARSEGRAD, SEBP_F32},
        [U_IN] = {r_in, k, SPARSEGRAD, SEBP_F32},
        [R] = {r_out, r_in, SPARSEGRAD, SEBP_F32},
    };
    for (int i = 0; i < MATRICES; i++) {
        int is_needed = all[i].method == METHODS || is_asked(l, all[i].method);
        l->at[i] = (sebp_matrix){NULL, is_needed ? all[i].rows : 0, all[i].cols, all[i].cols,
                                 all[i].dtype};
    }
}

/* Random inputs; moments begin at zero; vectors of a basis have a length of about 1, which is all
 * that matters here. */
static void fill(const layer *l, int which, int threads)
{
    static const int moments[] = {V1, V2, A1, A2, B1, B2};
    const sebp_matrix *a = &l->at[which];
    for (size_t i = 0; i < sizeof moments / sizeof *moments; i++) {
        if (which == moments[i]) {
            memset(a->data, 0, matrix_bytes(a));
            return;
        }
    }
    fill_random(a, l->asked->seed * MATRICES + (uint64_t)which, threads);
    float *vectors = a->data;
    for (int64_t i = 0; (which == U_OUT || which == U_IN) && i < a->rows * a->cols; i++)
        vectors[i] /= sqrtf((float)a->cols);
}

void fix_support(layer *l, int method)
{
    sebp_sparse *kept = &l->kept[method];
    sebp_sparse_adamw_destroy(l->states[method]);
    succeed(l, sebp_sparse_adamw_create(kept->rows, kept->cols, kept->indices, kept->count,
                                        &l->states[method]));
    free(kept->indices);
    kept->indices = (int64_t *)(uintptr_t)sebp_sparse_adamw_support(l->states[method]);
}

/* A mask at random: of as many even pieces as there are elements to keep, one element each. */
static void make_mask(layer *l)
{
    const sebp_sparse *kept = &l->kept[MASK];
    int64_t total = kept->rows * kept->cols, piece = total / l->k, longer = total % l->k;
    for (int64_t i = 0; i < l->k; i++) {
        uint64_t within = (uint64_t)(piece + (i < longer));
        int64_t start = i * piece + (i < longer ? i : longer);
        kept->indices[i] =
            start + (int64_t)(random_bits(l->asked->seed + 3000, (uint64_t)i) % within);
    }
    fix_support(l, MASK);
}

static void make_sparse(layer *l)
{
    if (is_asked(l, SPARSEGRAD))
        succeed(l, sebp_basis_from_vectors(&l->at[U_OUT], &l->at[U_IN], &l->basis));
    const int spaces[METHODS] = {[MASK] = W, [MEPROP] = W, [SPARSEGRAD] = R};
    for (int method = MASK; method < METHODS; method++) {
        const sebp_matrix *space = &l->at[spaces[method]];
        if (!is_asked(l, method))
            continue;
        l->kept[method] =
            (sebp_sparse){allocate((size_t)l->k * sizeof(int64_t)),
                          allocate((size_t)l->k * sizeof(float)), l->k, space->rows, space->cols};
        succeed(l, sebp_sparse_adamw_create(space->rows, space->cols, NULL, 0, &l->states[method]));
    }
    if (is_asked(l, MASK))
        make_mask(l);
}

static run *make_run(int phases)
{
    run *r = allocate(sizeof *r);
    memset(r, 0, sizeof *r);
    r->phases = phases;
    return r;
}

static void make_runs(layer *l)
{
    enum { ALL = (1 << PHASES) - 1, NO_CHOICE = ALL & ~(1 << GRADIENT) };
    for (int method = 0; method < METHODS; method++) {
        if (is_asked(l, method))
            l->runs[method] = make_run(method == FULL || method == LORA ? NO_CHOICE : ALL);
    }
    double min = sebp_sparsegrad_cost(l->basis, l->active, SEBP_ROTATE_AUTO);
    for (int order = 1; l->basis != NULL && order < ORDERS; order++) {
        if (sebp_sparsegrad_cost(l->basis, l->active, (sebp_rotation)order) <= WORTH_TIMING * min)
            l->orders[order] = make_run(1 << GRADIENT);
    }
}

int open_layer(layer *l, const machine *m, char *reason, size_t room)
{
    double needed = 0, available = available_memory();
    const sebp_matrix *r = &l->at[R];
    if (is_asked(l, SPARSEGRAD) && (double)l->k > (double)r->rows * (double)r->cols) {
        snprintf(reason, room, "skipped: %" PRId64 " x %" PRId64 " vectors have fewer elements",
                 r->rows, r->cols);
        return 0;
    }
    for (int i = 0; i < MATRICES; i++) {
        needed += (double)l->at[i].rows * (double)l->at[i].cols *
                  (double)sebp_dtype_bytes(l->at[i].dtype) *
                  (i == U_OUT || i == U_IN ? 2 : 1); /* a basis copies them */
    }
    if (needed >= (double)PTRDIFF_MAX || (available > 0 && needed > available)) {
        snprintf(reason, room, "skipped: needs %.1f GiB and %.1f GiB are available",
                 needed * 0x1p-30, available * 0x1p-30);
        return 0;
    }
    succeed(l, tail_rows(l->sizes, l->asked->seed, l->active, &l->rows));
    for (int i = 0; i < MATRICES; i++) {
        if (l->at[i].rows > 0) {
            l->at[i].data = allocate(matrix_bytes(&l->at[i]));
            fill(l, i, m->memory_threads);
        }
    }
    make_sparse(l);
    make_runs(l);
    return 1;
}

void close_layer(layer *l)
{
    for (int i = 0; i < MATRICES; i++)
        free(l->at[i].data);
    for (int method = 0; method < METHODS; method++) {
        if (sebp_sparse_adamw_support(l->states[method]) == NULL)
            free(l->kept[method].indices);
        free(l->kept[method].values);
        sebp_sparse_adamw_destroy(l->states[method]);
        free(l->runs[method]);
    }
    for (int order = 0; order < ORDERS; order++)
        free(l->orders[order]);
    sebp_basis_destroy(l->basis);
    sebp_rows_destroy(l->rows);
}
