/* SPDX-License-Identifier: Apache-2.0 */
#include "reference_sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "testing.h"

static double norm_of(const sebp_matrix *matrix, int64_t row)
{
    double sum = 0;
    for (int64_t j = 0; j < matrix->cols; j++)
        sum += testing_get(matrix, row, j) * testing_get(matrix, row, j);
    return sqrt(sum);
}

double *reference_scores(const sebp_matrix *dy, const sebp_matrix *x)
{
    double *score = testing_zeros(dy->rows, sizeof *score);
    for (int64_t i = 0; i < dy->rows; i++) {
        const double norm = norm_of(dy, i);
        if (norm != 0) {
            score[i] = norm * (x != NULL ? hypot(1, norm_of(x, i)) : 1);
            score[i] = isfinite(score[i]) ? score[i] : INFINITY;
        }
    }
    return score;
}

static int by_falling_score(const void *left, const void *right)
{
    double a, b;
    memcpy(&a, left, sizeof a);
    memcpy(&b, right, sizeof b);
    return (a < b) - (a > b);
}

reference_sample reference_sample_rows(const double *score, int64_t total, int64_t k)
{
    double *sorted = testing_zeros(total, sizeof *sorted), least = INFINITY;
    memcpy(sorted, score, (size_t)total * sizeof *sorted);
    qsort(sorted, (size_t)total, sizeof *sorted, by_falling_score);
    reference_sample best = {INFINITY, 0, 0};
    for (int64_t c = 0; c < k; c++) {
        double sum = 0;
        for (int64_t i = total - 1; i >= c; i--)
            sum += sorted[i];
        if (sum / (double)(k - c) < least) {
            least = sum / (double)(k - c);
            best = (reference_sample){c > 0 ? sorted[c - 1] : INFINITY, sum, k - c};
        }
    }
    free(sorted);
    return best;
}

double *reference_weights(const double *score, int64_t total, const reference_sample *sample,
                          uint64_t seed)
{
    double *weight = testing_zeros(total, sizeof *weight);
    for (int64_t i = 0; i < total; i++)
        weight[i] = score[i] >= sample->limit;
    for (int64_t j = 0; j < sample->draws; j++) {
        double u = (double)sebp_random_uniform(seed, UINT64_MAX, 2 * (uint64_t)j) +
                   (double)sebp_random_uniform(seed, UINT64_MAX, 2 * (uint64_t)j + 1) / 16777216;
        double sum = 0;
        int64_t i = -1;
        while (sum <= u * sample->sum) {
            i++;
            sum += score[i] < sample->limit ? score[i] : 0;
        }
        weight[i] += sample->sum / ((double)sample->draws * score[i]);
    }
    return weight;
}

sebp_matrix reference_uneven_gradient(int64_t M, int64_t N, sebp_dtype dtype, int spread)
{
    sebp_matrix dy = testing_matrix(M, N, testing_stride(N), dtype);
    testing_fill(&dy, TESTING_REAL);
    for (int64_t i = 0; i < M; i++) {
        const double scale = ldexp(1, (int)testing_between(-spread, spread));
        for (int64_t j = 0; j < N; j++)
            testing_set(&dy, i, j, testing_get(&dy, i, j) * scale);
    }
    testing_zero_rows(&dy, testing_uniform() * 0.4 + 0.6);
    return dy;
}
