/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file hosvd.c
 * The HOSVD of weight gradients that come one by one: their sums, and the eigenvectors of those.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "basis.h"
#include "integers.h"

enum {
    PANEL = 256, /* rows of a sum to a product; what a product has below the diagonal is wasted */
    CHUNK_ROWS = 4096 /* of a gradient, measured at a time */
};

/* No element of a sum is larger than the energy, so below this bound none overflows. */
static const double MAX_ENERGY = FLT_MAX / 2;

/* The largest number of products in an element of a sum, unless they are all zeros. With more of
 * them rounding in f32 could have any effect, and the error that import() allows for would
 * overflow. */
static const int64_t MAX_TERMS = INT64_C(1) << 30;

struct sebp_basis_sums {
    int64_t count;
    double energy;       /* sum ||G||^2 */
    sebp_matrix out, in; /* N x N and K x K: f32, the upper triangles */
};

sebp_status sebp_basis_sums_create(int64_t out_features, int64_t in_features,
                                   sebp_basis_sums **sums)
{
    const int64_t sizes[] = {out_features, in_features};
    if (sums == NULL)
        return SEBP_ERROR_NULL;
    if (out_features < 1 || in_features < 1)
        return SEBP_ERROR_SIZE;
    for (int i = 0; i < 2; i++) {
        int64_t elements, bytes;
        if (__builtin_mul_overflow(sizes[i], sizes[i], &elements) ||
            __builtin_mul_overflow(elements, (int64_t)sizeof(float), &bytes)) {
            return SEBP_ERROR_OVERFLOW;
        }
    }
    sebp_basis_sums *made = calloc(1, sizeof *made);
    if (made == NULL)
        return SEBP_ERROR_MEMORY;
    made->out = sebp_matrix_f32(calloc((size_t)(out_features * out_features), sizeof(float)),
                                out_features, out_features);
    made->in = sebp_matrix_f32(calloc((size_t)(in_features * in_features), sizeof(float)),
                               in_features, in_features);
    if (made->out.data == NULL || made->in.data == NULL) {
        sebp_basis_sums_destroy(made);
        return SEBP_ERROR_MEMORY;
    }
    *sums = made;
    return SEBP_SUCCESS;
}

void sebp_basis_sums_destroy(sebp_basis_sums *sums)
{
    if (sums != NULL) {
        free(sums->out.data);
        free(sums->in.data);
        free(sums);
    }
}

int64_t sebp_basis_sums_count(const sebp_basis_sums *sums)
{
    return sums != NULL ? sums->count : 0;
}

/* ---- adding ---- */

/* Whether `count` gradients are too many for the sums: an element has up to max(N, K) products of
 * each. */
static bool is_too_many(const sebp_basis_sums *sums, int64_t count, double energy)
{
    int64_t terms, size = sebp_max(sums->out.rows, sums->in.rows);
    return __builtin_mul_overflow(count, size, &terms) || (energy > 0 && terms > MAX_TERMS);
}

/* ||G||^2 in double; Inf where G holds a NaN or Inf. */
static double energy_of(sebp_call *call, const sebp_matrix *gradient)
{
    double score[CHUNK_ROWS], energy = 0;
    sebp_matrix chunk = *gradient;
    for (int64_t first = 0; first < gradient->rows && sebp_call_goes_on(call);
         first += CHUNK_ROWS) {
        chunk.data = (char *)gradient->data +
                     first * gradient->stride * (int64_t)sebp_dtype_bytes(gradient->dtype);
        chunk.rows = sebp_min(CHUNK_ROWS, gradient->rows - first);
        sebp_status status =
            call->backend->scan_rows(call->device, &chunk, SEBP_MEASURE_SQUARE_SUM, 0, score);
        sebp_call_keep(call, status, "looking at the gradient");
        for (int64_t i = 0; i < chunk.rows && sebp_call_goes_on(call); i++)
            energy += score[i];
    }
    return energy;
}

/* The upper triangle of sum += G G^T, or G^T G where `transposed`, in panels of its rows. */
static void add_square(sebp_call *call, const sebp_matrix *gradient, bool transposed,
                       const sebp_matrix *sum, bool runs)
{
    int64_t size = sum->rows;
    call->options.precision = SEBP_PRECISION_HIGHEST; /* errors would turn the vectors */
    for (int64_t i = 0; i < size && sebp_call_goes_on(call); i += PANEL) {
        int64_t step = (transposed ? 1 : gradient->stride) * i;
        const char *from =
            (const char *)gradient->data + step * (int64_t)sebp_dtype_bytes(gradient->dtype);
        sebp_plan plan = {
            .product = {.m = sebp_min(PANEL, size - i),
                        .n = size - i,
                        .k = transposed ? gradient->rows : gradient->cols,
                        .a = {from, gradient->stride, NULL, transposed, gradient->dtype},
                        .b = {from, gradient->stride, NULL, !transposed, gradient->dtype},
                        .c = (float *)sum->data + i * size + i,
                        .c_stride = size,
                        .accumulate = true},
        };
        sebp_plan_product(call, &plan);
        if (runs)
            sebp_run_product(call, &plan);
    }
}

sebp_status sebp_basis_sums_add(sebp_context *context, sebp_basis_sums *sums,
                                const sebp_matrix *gradient)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_basis_sums_add");
    const sebp_argument of_gradient = {"gradient", gradient, false};
    if (!sebp_require(&call, "sums", sums) || !sebp_require(&call, "gradient", gradient))
        return call.status;
    sebp_check_host_memory(&call); /* the sums are in host memory */
    sebp_check_views(&call, &of_gradient, 1);
    sebp_check_shape(&call, &of_gradient, sums->out.rows, sums->in.rows);
    if (!sebp_call_goes_on(&call))
        return call.status;
    double energy = sums->energy + energy_of(&call, gradient);
    if (!(energy < MAX_ENERGY)) {
        sebp_call_fail(&call, SEBP_ERROR_NONFINITE,
                       "gradient %" PRId64 " holds a NaN, an Inf or too large numbers",
                       sums->count);
    } else if (sums->count == INT64_MAX || is_too_many(sums, sums->count + 1, energy)) {
        sebp_call_fail(&call, SEBP_ERROR_OVERFLOW,
                       "with %" PRId64 " gradients of %" PRId64 "x%" PRId64 " the sums are full",
                       sums->count, sums->out.rows, sums->in.rows);
    }
    for (int runs = 0; runs < 2; runs++) {
        add_square(&call, gradient, false, &sums->out, runs);
        add_square(&call, gradient, true, &sums->in, runs);
    }
    if (sebp_call_goes_on(&call)) {
        sums->energy = energy;
        sums->count++;
    }
    return sebp_call_end(&call);
}

/* ---- copies ---- */

/* Copies the strict upper triangle into the lower one. */
static void fill_lower(const sebp_matrix *sum)
{
    float *data = sum->data;
    for (int64_t i = 0; i < sum->rows; i++) {
        for (int64_t j = i + 1; j < sum->rows; j++)
            data[j * sum->stride + i] = data[i * sum->stride + j];
    }
}

/* Checks the two matrices that sums are copied to or from, without comparing them. */
static sebp_status check_copies(const sebp_matrix *out, const sebp_matrix *in)
{
    const sebp_matrix *views[] = {out, in};
    for (int i = 0; i < 2; i++) {
        sebp_status status = sebp_matrix_check(views[i]);
        if (status != SEBP_SUCCESS)
            return status;
        if (views[i]->dtype != SEBP_F32)
            return SEBP_ERROR_DTYPE;
    }
    return SEBP_SUCCESS;
}

static bool are_of_shape(const sebp_basis_sums *sums, const sebp_matrix *out, const sebp_matrix *in)
{
    return out->rows == sums->out.rows && out->cols == sums->out.rows &&
           in->rows == sums->in.rows && in->cols == sums->in.rows;
}

sebp_status sebp_basis_sums_export(const sebp_basis_sums *sums, double *energy,
                                   const sebp_matrix *out, const sebp_matrix *in)
{
    if (sums == NULL || energy == NULL || out == NULL || in == NULL)
        return SEBP_ERROR_NULL;
    sebp_status status = check_copies(out, in);
    if (status != SEBP_SUCCESS)
        return status;
    if (!are_of_shape(sums, out, in))
        return SEBP_ERROR_SHAPE;
    if (sebp_views_overlap(out, in))
        return SEBP_ERROR_ALIAS;
    sebp_matrix_convert(&sums->out, out);
    sebp_matrix_convert(&sums->in, in);
    fill_lower(out);
    fill_lower(in);
    *energy = sums->energy;
    return SEBP_SUCCESS;
}

/* Element j of row i, j >= i: what lies below the diagonal is not read. */
static double element_of(const sebp_matrix *sum, int64_t i, int64_t j)
{
    return (double)((const float *)sum->data)[i * sum->stride + j];
}

static bool is_finite(const sebp_matrix *sum)
{
    for (int64_t i = 0; i < sum->rows; i++) {
        for (int64_t j = i; j < sum->rows; j++) {
            if (!isfinite(element_of(sum, i, j)))
                return false;
        }
    }
    return true;
}

/*
 * Whether a diagonal can be that of a sum of `count` squares, each of `depth` terms, with this
 * energy. Its elements are sums of squares. In whatever order they were added, each of the at most
 * count * depth roundings changes them by at most FLT_EPSILON / 2 of their size, and each term
 * may lose what is below FLT_MIN.
 */
static bool trace_is(const sebp_matrix *sum, double energy, int64_t count, int64_t depth)
{
    double trace = 0, terms = (double)count * (double)depth;
    for (int64_t i = 0; i < sum->rows; i++) {
        double element = element_of(sum, i, i);
        if (!(element >= 0))
            return false;
        trace += element;
    }
    double lost = 2 * terms * (double)sum->rows * (double)FLT_MIN;
    double apart =
        energy > 0 ? expm1(terms * (double)FLT_EPSILON) * energy : 0; /* 0 * Inf is NaN */
    return fabs(trace - energy) <= apart + lost;
}

/*
 * Whether the elements beside a diagonal that passes trace_is() can be dot products of the vectors
 * whose squares are on it: none is larger than the product of two norms. Rounding makes them
 * larger, and each of the squares smaller, by a factor of at most exp(FLT_EPSILON) for each term.
 */
static bool are_dot_products(const sebp_matrix *sum, int64_t count, int64_t depth)
{
    double terms = (double)count * (double)depth;
    /* Two such factors for the square of an element, one for each of the squares beside it. */
    double growth = exp(4 * terms * (double)FLT_EPSILON);
    double lost = 2 * terms * (double)FLT_MIN;
    for (int64_t i = 0; i < sum->rows; i++) {
        double max = growth * (element_of(sum, i, i) + lost);
        for (int64_t j = i + 1; j < sum->rows; j++) {
            double size = fabs(element_of(sum, i, j)) - lost;
            if (size > 0 && size * size > max * (element_of(sum, j, j) + lost))
                return false;
        }
    }
    return true;
}

sebp_status sebp_basis_sums_import(sebp_basis_sums *sums, int64_t count, double energy,
                                   const sebp_matrix *out, const sebp_matrix *in)
{
    if (sums == NULL || out == NULL || in == NULL)
        return SEBP_ERROR_NULL;
    sebp_status status = check_copies(out, in);
    if (status != SEBP_SUCCESS)
        return status;
    if (count < 0 || !(energy >= 0 && energy < MAX_ENERGY) || (count == 0 && energy > 0))
        return SEBP_ERROR_VALUE;
    if (!are_of_shape(sums, out, in))
        return SEBP_ERROR_SHAPE;
    if (is_too_many(sums, count, energy))
        return SEBP_ERROR_OVERFLOW;
    if (!is_finite(out) || !is_finite(in))
        return SEBP_ERROR_NONFINITE;
    if (!trace_is(out, energy, count, in->rows) || !trace_is(in, energy, count, out->rows) ||
        !are_dot_products(out, count, in->rows) || !are_dot_products(in, count, out->rows)) {
        return SEBP_ERROR_VALUE;
    }
    sebp_matrix_convert(out, &sums->out);
    sebp_matrix_convert(in, &sums->in);
    sums->count = count;
    sums->energy = energy;
    return SEBP_SUCCESS;
}

/* ---- solving ---- */

/* Checks that a rank is in range and that the gradients can span it. */
static void check_rank(sebp_call *call, const sebp_basis_sums *sums, const char *name, int64_t rank,
                       int64_t size)
{
    int64_t other = sebp_min(sums->out.rows, sums->in.rows);
    if (rank < 1 || rank > size) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "%s is %" PRId64 ", not 1 to %" PRId64, name, rank,
                       size);
    } else if (sebp_div_ceil(rank, other) > sums->count || sums->energy == 0) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "%" PRId64 " gradients of %" PRId64 "x%" PRId64
                       "%s do not span %s of %" PRId64,
                       sums->count, sums->out.rows, sums->in.rows,
                       sums->energy == 0 ? ", all zero," : "", name, rank);
    }
}

static float *row_of(const sebp_matrix *vectors, int64_t i)
{
    return (float *)vectors->data + i * vectors->stride;
}

/* Puts the largest eigenvalue first: eigenvectors come with ascending ones. */
static void reverse_rows(const sebp_matrix *vectors)
{
    for (int64_t i = 0, j = vectors->rows - 1; i < j; i++, j--) {
        float *first = row_of(vectors, i), *last = row_of(vectors, j);
        for (int64_t k = 0; k < vectors->cols; k++) {
            float value = first[k];
            first[k] = last[k];
            last[k] = value;
        }
    }
}

/* A vector may have either sign. Its largest element, the first of them, is made positive. */
static void fix_signs(const sebp_matrix *vectors)
{
    for (int64_t i = 0; i < vectors->rows; i++) {
        float *row = row_of(vectors, i), largest = 0;
        for (int64_t j = 0; j < vectors->cols; j++) {
            if (fabsf(row[j]) > fabsf(largest))
                largest = row[j];
        }
        for (int64_t j = 0; j < vectors->cols && largest < 0; j++)
            row[j] = -row[j];
    }
}

/* Finds the leading eigenvectors of a sum, as many as `vectors` has rows, and their share of the
 * energy. */
static void solve(sebp_call *call, const sebp_matrix *sum, double energy,
                  const sebp_matrix *vectors, double *share)
{
    char why[SEBP_WHY_BYTES];
    if (!sebp_call_goes_on(call))
        return;
    if (!is_finite(sum)) { /* on such a matrix LAPACK may never finish */
        sebp_call_fail(call, SEBP_ERROR_NONFINITE, "the sums hold a NaN or an Inf");
        return;
    }
    float *values = malloc((size_t)sum->rows * sizeof *values);
    if (values == NULL) {
        sebp_call_fail(call, SEBP_ERROR_MEMORY, "no memory for eigenvalues");
        return;
    }
    sebp_status status = call->backend->eigenvectors(call->device, sum, vectors, values, why);
    if (status != SEBP_SUCCESS)
        sebp_call_fail(call, status, "%s", why);
    if (sebp_call_goes_on(call)) {
        reverse_rows(vectors);
        fix_signs(vectors);
        double sum_of_values = 0;
        for (int64_t i = 0; i < vectors->rows; i++)
            sum_of_values += (double)values[i];
        *share = sum_of_values / energy;
        if (!(sum_of_values > 0)) {
            sebp_call_fail(call, SEBP_ERROR_VALUE,
                           "the sums hold nothing that f32 can tell: gradients are too small, or "
                           "the sums were not from here");
        }
    }
    free(values);
}

sebp_status sebp_basis_solve(sebp_context *context, sebp_basis_sums *sums, int64_t rank_out,
                             int64_t rank_in, sebp_basis **basis)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_basis_solve");
    if (!sebp_require(&call, "sums", sums) || !sebp_require(&call, "basis", basis))
        return call.status;
    check_rank(&call, sums, "rank_out", rank_out, sums->out.rows);
    check_rank(&call, sums, "rank_in", rank_in, sums->in.rows);
    if (!sebp_call_goes_on(&call))
        return call.status;
    sebp_basis *made;
    sebp_status status = sebp_basis_make(rank_out, sums->out.rows, rank_in, sums->in.rows, &made);
    if (status != SEBP_SUCCESS) {
        sebp_call_fail(&call, status, "no memory for the basis");
        return call.status;
    }
    solve(&call, &sums->out, sums->energy, &made->out, &made->share_out);
    solve(&call, &sums->in, sums->energy, &made->in, &made->share_in);
    if (sebp_call_goes_on(&call))
        *basis = made;
    else
        sebp_basis_destroy(made);
    return sebp_call_end(&call);
}
