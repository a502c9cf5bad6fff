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

#ifdef SEBP_HAVE_LAPACK
#include <lapacke.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#endif

#include "basis.h"
#include "call.h"

enum {
    PANEL = 256,       /* rows of a sum to a product: what of it lies below the diagonal is waste */
    CHUNK_ROWS = 4096, /* of a gradient, measured at a time */
    WORK_FLOATS = 66 /* for each of n, to LAPACK's ssyevr: 26 and a block of its reduction of 40 */
};

/* No element of a sum is larger than the energy, so that below this none overflows. */
static const double MAX_ENERGY = FLT_MAX / 2;

/* Products in an element of a sum, unless they are all zeros. With more the rounding of f32 may have
 * done anything, and what import() allows for would overflow. */
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
    if (!sums)
        return SEBP_ERROR_NULL;
    if (out_features < 1 || in_features < 1)
        return SEBP_ERROR_SIZE;
    for (int i = 0; i < 2; i++) {
        int64_t elements, bytes;
        if (__builtin_mul_overflow(sizes[i], sizes[i], &elements) ||
            __builtin_mul_overflow(elements, (int64_t)sizeof(float), &bytes))
            return SEBP_ERROR_OVERFLOW;
    }
    sebp_basis_sums *made = calloc(1, sizeof *made);
    if (!made)
        return SEBP_ERROR_MEMORY;
    made->out = sebp_matrix_f32(calloc((size_t)(out_features * out_features), sizeof(float)),
                                out_features, out_features);
    made->in = sebp_matrix_f32(calloc((size_t)(in_features * in_features), sizeof(float)),
                               in_features, in_features);
    if (!made->out.data || !made->in.data) {
        sebp_basis_sums_destroy(made);
        return SEBP_ERROR_MEMORY;
    }
    *sums = made;
    return SEBP_SUCCESS;
}

void sebp_basis_sums_destroy(sebp_basis_sums *sums)
{
    if (sums) {
        free(sums->out.data);
        free(sums->in.data);
        free(sums);
    }
}

int64_t sebp_basis_sums_count(const sebp_basis_sums *sums)
{
    return sums ? sums->count : 0;
}

/* ---- adding ---- */

/* Whether so many gradients are too many for sums, whose elements are of up to max(N, K) products
 * each. */
static bool is_too_many(const sebp_basis_sums *sums, int64_t count, double energy)
{
    int64_t terms, size = sums->out.rows > sums->in.rows ? sums->out.rows : sums->in.rows;
    return __builtin_mul_overflow(count, size, &terms) || (energy > 0 && terms > MAX_TERMS);
}

/* ||G||^2 in double; Inf where G holds a NaN or Inf. */
static double energy_of(sebp_context *context, const sebp_matrix *gradient)
{
    double score[CHUNK_ROWS], energy = 0;
    sebp_matrix chunk = *gradient;
    for (int64_t first = 0; first < gradient->rows; first += CHUNK_ROWS) {
        chunk.data = (char *)gradient->data +
                     first * gradient->stride * (int64_t)sebp_dtype_bytes(gradient->dtype);
        chunk.rows = gradient->rows - first < CHUNK_ROWS ? gradient->rows - first : CHUNK_ROWS;
        context->backend->scan_rows(context->device, &chunk, SEBP_MEASURE_SQUARE_SUM, 0, score);
        for (int64_t i = 0; i < chunk.rows; i++)
            energy += score[i];
    }
    return energy;
}

/* The upper triangle of sum += G G^T, or G^T G where `transposed`, in panels of its rows. */
static sebp_status add_square(const sebp_call *call, const sebp_matrix *gradient, bool transposed,
                              const sebp_matrix *sum, bool runs)
{
    int64_t size = sum->rows;
    sebp_status status = SEBP_SUCCESS;
    for (int64_t i = 0; i < size && status == SEBP_SUCCESS; i += PANEL) {
        int64_t step = (transposed ? 1 : gradient->stride) * i;
        const char *from =
            (const char *)gradient->data + step * (int64_t)sebp_dtype_bytes(gradient->dtype);
        sebp_product product = {.m = size - i < PANEL ? size - i : PANEL, .n = size - i};
        product.k = transposed ? gradient->rows : gradient->cols;
        product.dtype = gradient->dtype;
        product.a = (sebp_operand){from, gradient->stride, NULL, transposed};
        product.b = (sebp_operand){from, gradient->stride, NULL, !transposed};
        product.c = (float *)sum->data + i * size + i;
        product.c_stride = size;
        product.accumulate = true;
        const char *path;
        status = runs ? sebp_run(call, &product, &path) : sebp_reserve(call, &product);
    }
    return status;
}

sebp_status sebp_basis_sums_add(sebp_context *context, sebp_basis_sums *sums,
                                const sebp_matrix *gradient)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_basis_sums_add");
    const sebp_argument of_gradient = {"gradient", gradient, false};
    if (!sums || !gradient)
        return sebp_missing(&call, !sums ? "sums" : "gradient");
    sebp_status status = sebp_check_views(&call, &of_gradient, 1);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &of_gradient, sums->out.rows, sums->in.rows);
    if (status != SEBP_SUCCESS)
        return status;
    double energy = sums->energy + energy_of(context, gradient);
    if (!(energy < MAX_ENERGY))
        return sebp_fail(context, SEBP_ERROR_NONFINITE,
                         "%s: gradient %" PRId64 " holds a NaN, an Inf or too large numbers",
                         call.function, sums->count);
    if (sums->count == INT64_MAX || is_too_many(sums, sums->count + 1, energy))
        return sebp_fail(context, SEBP_ERROR_OVERFLOW,
                         "%s: with %" PRId64 " gradients of %" PRId64 "x%" PRId64
                         " the sums are full",
                         call.function, sums->count, sums->out.rows, sums->in.rows);
    for (int runs = 0; runs < 2 && status == SEBP_SUCCESS; runs++) {
        status = add_square(&call, gradient, false, &sums->out, runs);
        if (status == SEBP_SUCCESS)
            status = add_square(&call, gradient, true, &sums->in, runs);
    }
    if (status == SEBP_SUCCESS) {
        sums->energy = energy;
        sums->count++;
    }
    return status;
}

/* ---- copies ---- */

/* Copies the strict upper triangle into the lower one, or back. */
static void mirror(const sebp_matrix *sum, bool to_lower)
{
    float *data = sum->data;
    for (int64_t i = 0; i < sum->rows; i++) {
        for (int64_t j = i + 1; j < sum->rows; j++) {
            float *upper = data + i * sum->stride + j, *lower = data + j * sum->stride + i;
            if (to_lower)
                *lower = *upper;
            else
                *upper = *lower;
        }
    }
}

/* Checks the two matrices that sums are copied to or from, each by itself. */
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
    if (!sums || !energy || !out || !in)
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
    mirror(out, true);
    mirror(in, true);
    *energy = sums->energy;
    return SEBP_SUCCESS;
}

/* Element j of row i, j >= i: what lies below the diagonal is not looked at. */
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
 * Whether a diagonal is that of a sum of `count` squares, each of `depth` terms, whose energy is
 * known. Its elements are sums of squares: whatever order they were added in, each of the at most
 * count * depth roundings takes away or adds FLT_EPSILON / 2 of it at most, and what is below FLT_MIN
 * may be lost with each term.
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
    double apart = energy > 0 ? expm1(terms * (double)FLT_EPSILON) * energy : 0; /* 0 Inf is NaN */
    return fabs(trace - energy) <= apart + lost;
}

/*
 * Whether the elements beside a diagonal that trace_is() takes may be dot products of the vectors
 * whose squares are on it: none is larger than the product of two norms. Rounding makes it larger,
 * and each of the squares smaller, by a factor of exp(FLT_EPSILON) for each term at most.
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
    if (!sums || !out || !in)
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
        !are_dot_products(out, count, in->rows) || !are_dot_products(in, count, out->rows))
        return SEBP_ERROR_VALUE;
    sebp_matrix_convert(out, &sums->out);
    sebp_matrix_convert(in, &sums->in);
    sums->count = count;
    sums->energy = energy;
    return SEBP_SUCCESS;
}

/* ---- solving ---- */

/* That a rank is in range and that the gradients can span it. */
static sebp_status check_rank(const sebp_call *call, const sebp_basis_sums *sums, const char *name,
                              int64_t rank, int64_t size)
{
    int64_t other = sums->out.rows < sums->in.rows ? sums->out.rows : sums->in.rows;
    if (rank < 1 || rank > size)
        return sebp_fail(call->context, SEBP_ERROR_VALUE,
                         "%s: %s is %" PRId64 ", not 1 to %" PRId64, call->function, name, rank,
                         size);
    if ((rank + other - 1) / other > sums->count || sums->energy == 0)
        return sebp_fail(call->context, SEBP_ERROR_VALUE,
                         "%s: %" PRId64 " gradients of %" PRId64 "x%" PRId64 "%s do not span %s of "
                         "%" PRId64,
                         call->function, sums->count, sums->out.rows, sums->in.rows,
                         sums->energy == 0 ? ", all zero," : "", name, rank);
    return SEBP_SUCCESS;
}

#ifdef SEBP_HAVE_LAPACK

static float *row_of(const sebp_matrix *vectors, int64_t i)
{
    return (float *)vectors->data + i * vectors->stride;
}

/* Eigenvectors come by ascending eigenvalue. */
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

/* A vector's sign is free: its largest element, the first of them, shall be positive. */
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

static sebp_status no_workspace(const sebp_call *call)
{
    return sebp_fail(call->context, SEBP_ERROR_MEMORY, "%s: no memory for LAPACK's workspace",
                     call->function);
}

/*
 * Lets LAPACK have no more threads than the context works on. Most of all where that is one: after a
 * fork a BLAS on OpenMP would wait for ever for threads that are gone. Gives the number that there
 * was, for restore_threads().
 */
static int limit_threads(const sebp_context *context)
{
    int before = 1;
#ifdef _OPENMP
    int max = context->backend->openmp_threads(context->device);
    before = omp_get_max_threads();
    if (max < before)
        omp_set_num_threads(max);
#else
    (void)context;
#endif
    return before;
}

static void restore_threads(int before)
{
#ifdef _OPENMP
    omp_set_num_threads(before);
#else
    (void)before;
#endif
}

static sebp_status check_lapack(const sebp_call *call, const char *routine, lapack_int info)
{
    if (info == 0)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_BACKEND, "%s: LAPACK's %s %s: %d", call->function,
                     routine, info < 0 ? "refuses an argument" : "finds no eigenvectors",
                     (int)info);
}

/* What is the upper triangle row by row is the lower one column by column; eigenvectors come as
 * columns, so as memory rows. Eigenvalues come in ascending order. */
enum { LAYOUT = LAPACK_COL_MAJOR };
static const char TRIANGLE = 'L';

/*
 * All eigenvectors of a sum, by divide and conquer, in place: ssyevr would do with less memory, but
 * gives f32 vectors that are not orthogonal where many eigenvalues are near zero, as those of few
 * gradients are.
 */
static sebp_status solve_all(const sebp_call *call, const sebp_matrix *sum,
                             const sebp_matrix *vectors, float *values)
{
    int64_t n = sum->rows, work_count = 1 + 6 * n + 2 * n * n, iwork_count = 3 + 5 * n;
    if (work_count > INT32_MAX)
        return sebp_fail(call->context, SEBP_ERROR_OVERFLOW,
                         "%s: LAPACK has no workspace for all vectors of %" PRId64
                         ": ask for fewer",
                         call->function, n);
    float *work = malloc((size_t)work_count * sizeof *work);
    lapack_int *iwork = malloc((size_t)iwork_count * sizeof *iwork);
    sebp_status status;
    if (work && iwork) {
        sebp_matrix_convert(sum, vectors);
        lapack_int info = LAPACKE_ssyevd_work(
            LAYOUT, 'V', TRIANGLE, (lapack_int)n, vectors->data, (lapack_int)vectors->stride,
            values, work, (lapack_int)work_count, iwork, (lapack_int)iwork_count);
        status = check_lapack(call, "ssyevd", info);
    } else {
        status = no_workspace(call);
    }
    free(work);
    free(iwork);
    return status;
}

/*
 * The eigenvectors of the largest eigenvalues, fewer than all: for a part ssyevr does bisection and
 * inverse iteration. It destroys a triangle and the diagonal, so the other triangle keeps the sum.
 */
static sebp_status solve_leading(const sebp_call *call, const sebp_matrix *sum,
                                 const sebp_matrix *vectors, float *values)
{
    lapack_int n = (lapack_int)sum->rows, rank = (lapack_int)vectors->rows, found = 0;
    lapack_int stride = (lapack_int)vectors->stride;
    float *data = sum->data;
    lapack_int work_count = WORK_FLOATS * n, iwork_count = 10 * n;
    float *diagonal = malloc((size_t)n * sizeof *diagonal);
    lapack_int *support = malloc(2 * (size_t)n * sizeof *support);
    float *work = malloc((size_t)work_count * sizeof *work);
    lapack_int *iwork = malloc((size_t)iwork_count * sizeof *iwork);
    sebp_status status;
    if (diagonal && support && work && iwork) {
        for (int64_t i = 0; i < n; i++)
            diagonal[i] = data[i * n + i];
        mirror(sum, true);
        lapack_int info = LAPACKE_ssyevr_work(
            LAYOUT, 'V', 'I', TRIANGLE, n, data, n, 0, 0, n - rank + 1, n, 0, &found, values,
            vectors->data, stride, support, work, work_count, iwork, iwork_count);
        mirror(sum, false);
        for (int64_t i = 0; i < n; i++)
            data[i * n + i] = diagonal[i];
        status = check_lapack(call, "ssyevr", info != 0 ? info : rank - found);
    } else {
        status = no_workspace(call);
    }
    free(diagonal);
    free(support);
    free(work);
    free(iwork);
    return status;
}

/* Whether what LAPACK has found is numbers. */
static bool are_numbers(const float *values, const sebp_matrix *vectors)
{
    for (int64_t i = 0; i < vectors->rows; i++) {
        if (!isfinite(values[i]))
            return false;
    }
    return sebp_basis_all_finite(vectors);
}

/* The leading eigenvectors of a sum, as many as there is room for, and their share of the energy. */
static sebp_status solve(const sebp_call *call, const sebp_matrix *sum, double energy,
                         const sebp_matrix *vectors, double *share)
{
    int64_t rank = vectors->rows;
    if (!is_finite(sum)) /* with which LAPACK may not even come to an end */
        return sebp_fail(call->context, SEBP_ERROR_NONFINITE, "%s: the sums hold a NaN or an Inf",
                         call->function);
    float *values = malloc((size_t)sum->rows * sizeof *values);
    if (!values)
        return no_workspace(call);
    sebp_status status = rank == sum->rows ? solve_all(call, sum, vectors, values)
                                           : solve_leading(call, sum, vectors, values);
    if (status == SEBP_SUCCESS && !are_numbers(values, vectors))
        status = sebp_fail(call->context, SEBP_ERROR_NONFINITE,
                           "%s: LAPACK's %s gives a NaN or an Inf for sums that hold none",
                           call->function, rank == sum->rows ? "ssyevd" : "ssyevr");
    if (status == SEBP_SUCCESS) {
        reverse_rows(vectors);
        fix_signs(vectors);
        double sum_of_values = 0;
        for (int64_t i = 0; i < rank; i++)
            sum_of_values += (double)values[i];
        *share = sum_of_values / energy;
        if (!(sum_of_values > 0))
            status = sebp_fail(call->context, SEBP_ERROR_VALUE,
                               "%s: the sums hold nothing that f32 can tell: gradients are too "
                               "small, or the sums were not from here",
                               call->function);
    }
    free(values);
    return status;
}

#endif

sebp_status sebp_basis_solve(sebp_context *context, sebp_basis_sums *sums, int64_t rank_out,
                             int64_t rank_in, sebp_basis **basis)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_basis_solve");
    if (!sums || !basis)
        return sebp_missing(&call, !sums ? "sums" : "basis");
    sebp_status status = check_rank(&call, sums, "rank_out", rank_out, sums->out.rows);
    if (status == SEBP_SUCCESS)
        status = check_rank(&call, sums, "rank_in", rank_in, sums->in.rows);
    if (status != SEBP_SUCCESS)
        return status;
#ifdef SEBP_HAVE_LAPACK
    sebp_basis *made;
    status = sebp_basis_make(rank_out, sums->out.rows, rank_in, sums->in.rows, &made);
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status, "%s: no memory for the basis", call.function);
    int threads = limit_threads(context);
    status = solve(&call, &sums->out, sums->energy, &made->out, &made->share_out);
    if (status == SEBP_SUCCESS)
        status = solve(&call, &sums->in, sums->energy, &made->in, &made->share_in);
    restore_threads(threads);
    if (status == SEBP_SUCCESS)
        *basis = made;
    else
        sebp_basis_destroy(made);
    return status;
#else
    return sebp_fail(context, SEBP_ERROR_UNSUPPORTED,
                     "%s: this build has no LAPACK; install LAPACKE (Debian and Ubuntu: "
                     "liblapacke-dev libopenblas-openmp-dev) and build again",
                     call.function);
#endif
}
