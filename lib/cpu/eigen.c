/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file eigen.c
 * Eigenvectors by LAPACK, where the build has it.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef SEBP_HAVE_LAPACK
#include <lapacke.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#endif

#include "operations.h"

#ifdef SEBP_HAVE_LAPACK

/* LAPACK's ssyevr needs 26 n floats, and a block of its reduction 40 n. */
enum { WORK_FLOATS = 66 };

/* LAPACK counts by columns, we by rows: our upper triangle is its lower one, and an eigenvector,
 * which is a column to it, is a row to us. Eigenvalues come in ascending order. */
enum { LAYOUT = LAPACK_COL_MAJOR };
static const char TRIANGLE = 'L';

/*
 * LAPACK gets no more threads than the device works on, and one where the host has a pool of its
 * own. This matters most after a fork: a BLAS on OpenMP would wait for ever for threads that are
 * gone. Returns the number that there was, for restore_threads().
 */
static int limit_threads(const sebp_cpu *cpu)
{
    int before = 1;
#ifdef _OPENMP
    int max = cpu->parallel_for != NULL ? 1 : sebp_cpu_threads(cpu);
    before = omp_get_max_threads();
    if (max < before)
        omp_set_num_threads(max);
#else
    (void)cpu;
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

static sebp_status no_workspace(char why[SEBP_WHY_BYTES])
{
    snprintf(why, SEBP_WHY_BYTES, "no memory for LAPACK's workspace");
    return SEBP_ERROR_MEMORY;
}

static sebp_status check_lapack(const char *routine, lapack_int info, char why[SEBP_WHY_BYTES])
{
    if (info == 0)
        return SEBP_SUCCESS;
    snprintf(why, SEBP_WHY_BYTES, "LAPACK's %s %s: %d", routine,
             info < 0 ? "refuses an argument" : "finds no eigenvectors", (int)info);
    return SEBP_ERROR_BACKEND;
}

/*
 * All eigenvectors, in place, by divide and conquer. ssyevr would need less memory. But where many
 * eigenvalues are near zero, as with the sums of few gradients, its f32 vectors are not orthogonal.
 */
static sebp_status solve_all(const sebp_matrix *sum, const sebp_matrix *vectors, float *values,
                             char why[SEBP_WHY_BYTES])
{
    int64_t n = sum->rows, work_count = 1 + 6 * n + 2 * n * n, iwork_count = 3 + 5 * n;
    if (work_count > INT32_MAX) {
        snprintf(why, SEBP_WHY_BYTES,
                 "LAPACK has no workspace for all vectors of %" PRId64 ": ask for fewer", n);
        return SEBP_ERROR_OVERFLOW;
    }
    float *work = malloc((size_t)work_count * sizeof *work);
    lapack_int *iwork = malloc((size_t)iwork_count * sizeof *iwork);
    sebp_status status;
    if (work != NULL && iwork != NULL) {
        for (int64_t i = 0; i < n; i++) {
            memcpy((float *)vectors->data + i * vectors->stride, (float *)sum->data + i * n,
                   (size_t)n * sizeof(float));
        }
        lapack_int info = LAPACKE_ssyevd_work(
            LAYOUT, 'V', TRIANGLE, (lapack_int)n, vectors->data, (lapack_int)vectors->stride,
            values, work, (lapack_int)work_count, iwork, (lapack_int)iwork_count);
        status = check_lapack("ssyevd", info, why);
    } else {
        status = no_workspace(why);
    }
    free(work);
    free(iwork);
    return status;
}

/* Copies the strict upper triangle into the lower one, or back. */
static void mirror(float *data, int64_t n, bool to_lower)
{
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = i + 1; j < n; j++) {
            float *upper = data + i * n + j, *lower = data + j * n + i;
            if (to_lower)
                *lower = *upper;
            else
                *upper = *lower;
        }
    }
}

/*
 * The eigenvectors of the largest eigenvalues, fewer than all; for these ssyevr uses bisection and
 * inverse iteration. It destroys a triangle and the diagonal, so the other triangle keeps the sum.
 */
static sebp_status solve_leading(const sebp_matrix *sum, const sebp_matrix *vectors, float *values,
                                 char why[SEBP_WHY_BYTES])
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
    if (diagonal != NULL && support != NULL && work != NULL && iwork != NULL) {
        for (int64_t i = 0; i < n; i++)
            diagonal[i] = data[i * n + i];
        mirror(data, n, true);
        lapack_int info = LAPACKE_ssyevr_work(
            LAYOUT, 'V', 'I', TRIANGLE, n, data, n, 0, 0, n - rank + 1, n, 0, &found, values,
            vectors->data, stride, support, work, work_count, iwork, iwork_count);
        mirror(data, n, false);
        for (int64_t i = 0; i < n; i++)
            data[i * n + i] = diagonal[i];
        status = check_lapack("ssyevr", info != 0 ? info : rank - found, why);
    } else {
        status = no_workspace(why);
    }
    free(diagonal);
    free(support);
    free(work);
    free(iwork);
    return status;
}

/* Whether all that LAPACK has found is finite. */
static bool are_numbers(const float *values, const sebp_matrix *vectors)
{
    bool finite = true;
    for (int64_t i = 0; i < vectors->rows; i++) {
        const float *row = (const float *)vectors->data + i * vectors->stride;
        finite = finite && isfinite(values[i]);
        for (int64_t j = 0; j < vectors->cols; j++)
            finite = finite && isfinite(row[j]);
    }
    return finite;
}

sebp_status sebp_cpu_eigenvectors(void *device, const sebp_matrix *sum, const sebp_matrix *vectors,
                                  float *values, char why[SEBP_WHY_BYTES])
{
    int threads = limit_threads(device);
    bool all = vectors->rows == sum->rows;
    sebp_status status =
        all ? solve_all(sum, vectors, values, why) : solve_leading(sum, vectors, values, why);
    restore_threads(threads);
    if (status == SEBP_SUCCESS && !are_numbers(values, vectors)) {
        snprintf(why, SEBP_WHY_BYTES, "LAPACK's %s gives a NaN or an Inf for sums that hold none",
                 all ? "ssyevd" : "ssyevr");
        status = SEBP_ERROR_NONFINITE;
    }
    return status;
}

#else

sebp_status sebp_cpu_eigenvectors(void *device, const sebp_matrix *sum, const sebp_matrix *vectors,
                                  float *values, char why[SEBP_WHY_BYTES])
{
    (void)device, (void)sum, (void)vectors, (void)values;
    snprintf(why, SEBP_WHY_BYTES,
             "this build has no LAPACK; install LAPACKE (Debian and Ubuntu: liblapacke-dev "
             "libopenblas-openmp-dev) and build again");
    return SEBP_ERROR_UNSUPPORTED;
}

#endif
