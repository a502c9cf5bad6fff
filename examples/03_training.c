/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 03_training.c
 * A training loop: two layers with a ReLU between them learn what a random network computes, by
 * AdamW, on all rows and on the active ones. A row set is made once and serves every layer.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <sebp/sebp.h>

/* 16 texts padded to 64 tokens; 64 features become 256, then 32. */
enum { TEXTS = 16, LENGTH = 64, M = TEXTS * LENGTH, K = 64, H = 256, N = 32, STEPS = 300 };

static const int64_t lengths[TEXTS] = {9, 21, 14, 5, 30, 12, 7, 18, 4, 11, 16, 8, 25, 6, 13, 10};

/** A matrix that trains, with what AdamW needs; there is room for the largest. */
struct tensor {
    int64_t rows, cols;
    float value[H * K], gradient[H * K], moment1[H * K], moment2[H * K];
};

static struct tensor w1 = {.rows = H, .cols = K}, b1 = {.rows = 1, .cols = H};
static struct tensor w2 = {.rows = N, .cols = H}, b2 = {.rows = 1, .cols = N};
static struct tensor *const tensors[] = {&w1, &b1, &w2, &b2};
static float x[M * K], target[M * N], h[M * H], y[M * N], dy[M * N], dh[M * H];

static void check(const sebp_context *context, sebp_status status)
{
    if (status != SEBP_SUCCESS) {
        fprintf(stderr, "%s: %s\n", sebp_status_string(status), sebp_context_message(context));
        exit(1);
    }
}

static double milliseconds(void)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

static sebp_matrix view(const struct tensor *t, const float *data)
{
    return sebp_matrix_f32(data, t->rows, t->cols);
}

/** Random parameters up to `size`; moments of zero. */
static void begin(double size)
{
    for (int i = 0; i < 4; i++) {
        struct tensor *t = tensors[i];
        memset(t->moment1, 0, sizeof t->moment1);
        memset(t->moment2, 0, sizeof t->moment2);
        for (int64_t j = 0; j < t->rows * t->cols; j++) {
            t->value[j] = (float)(size * (2.0 * rand() / RAND_MAX - 1.0));
        }
    }
}

static void forward(sebp_context *context, const sebp_rows *rows)
{
    sebp_matrix xv = sebp_matrix_f32(x, M, K), hv = sebp_matrix_f32(h, M, H);
    sebp_matrix yv = sebp_matrix_f32(y, M, N);
    sebp_matrix w1v = view(&w1, w1.value), b1v = view(&b1, b1.value);
    sebp_matrix w2v = view(&w2, w2.value), b2v = view(&b2, b2.value);
    check(context, sebp_linear_forward(context, &xv, &w1v, &b1v, rows, NULL, &hv));
    for (int i = 0; i < M * H; i++) {
        h[i] = h[i] > 0.0f ? h[i] : 0.0f;
    }
    check(context, sebp_linear_forward(context, &hv, &w2v, &b2v, rows, NULL, &yv));
}

/** The mean square of what is wrong on real tokens, and its gradient; padding has none. */
static double loss(double tokens)
{
    double sum = 0.0;
    for (int64_t i = 0; i < M * N; i++) {
        float wrong = i / N % LENGTH < lengths[i / N / LENGTH] ? y[i] - target[i] : 0.0f;
        sum += (double)wrong * (double)wrong;
        dy[i] = (float)(2.0 * (double)wrong / (tokens * N));
    }
    return sum / (tokens * N);
}

static void backward(sebp_context *context, const sebp_rows *rows)
{
    sebp_matrix xv = sebp_matrix_f32(x, M, K), hv = sebp_matrix_f32(h, M, H);
    sebp_matrix dyv = sebp_matrix_f32(dy, M, N), dhv = sebp_matrix_f32(dh, M, H);
    sebp_matrix dw1 = view(&w1, w1.gradient), db1 = view(&b1, b1.gradient);
    sebp_matrix dw2 = view(&w2, w2.gradient), db2 = view(&b2, b2.gradient);
    sebp_matrix w2v = view(&w2, w2.value);
    check(context, sebp_linear_backward(context, &dyv, &hv, &w2v, rows, NULL, &dhv, &dw2, &db2));
    for (int i = 0; i < M * H; i++) {
        dh[i] = h[i] > 0.0f ? dh[i] : 0.0f;
    }
    /* Nothing asks for dX of the first layer, so its W is not needed either. */
    check(context, sebp_linear_backward(context, &dhv, &xv, NULL, rows, NULL, NULL, &dw1, &db1));
}

static void optimize(sebp_context *context, int64_t step)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 3e-3;
    for (int i = 0; i < 4; i++) {
        const struct tensor *t = tensors[i];
        sebp_matrix value = view(t, t->value), gradient = view(t, t->gradient);
        sebp_matrix moment1 = view(t, t->moment1), moment2 = view(t, t->moment2);
        check(context,
              sebp_adamw_step(context, &gradient, step, &options, &value, &moment1, &moment2));
    }
}

int main(void)
{
    sebp_context *context = NULL;
    sebp_rows *rows[2] = {NULL, NULL};
    check(context, sebp_context_create(NULL, &context));
    check(context, sebp_rows_all(M, &rows[0]));
    check(context, sebp_rows_from_lengths(lengths, TEXTS, LENGTH, &rows[1]));
    for (int way = 0; way < 2; way++) {
        srand(1); /* the same data, network and parameters */
        for (int i = 0; i < M * K; i++) {
            x[i] = (float)(2.0 * rand() / RAND_MAX - 1.0);
        }
        begin(0.3);
        forward(context, rows[0]);
        memcpy(target, y, sizeof target);
        begin(0.1);
        printf("%-12s", way == 0 ? "all rows:" : "active rows:");
        double started = milliseconds();
        for (int step = 1; step <= STEPS; step++) {
            forward(context, rows[way]);
            double now = loss((double)sebp_rows_count(rows[1]));
            backward(context, rows[way]);
            optimize(context, step);
            if (step == 1 || step % 100 == 0) {
                printf("  loss %.5f at step %d", now, step);
            }
        }
        printf(";  %.2f ms a step\n", (milliseconds() - started) / STEPS);
    }
    sebp_rows_destroy(rows[0]);
    sebp_rows_destroy(rows[1]);
    sebp_context_destroy(context);
    return 0;
}
