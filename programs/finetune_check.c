/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file finetune_check.c
 * The gradients by finite differences; parameters and batches for other programs.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "programs/finetune.h"
#include "programs/training.h"

static int64_t elements(const struct tensor *tensor)
{
    return tensor->rows * tensor->cols;
}

static double norm_of(const float *values, int64_t count)
{
    double squares = 0.0;
    for (int64_t j = 0; j < count; j++) {
        squares += (double)values[j] * (double)values[j];
    }
    return sqrt(squares);
}

static int64_t bytes_of(const struct tensor *tensor)
{
    return elements(tensor) * (int64_t)sizeof(float);
}

/** What a check has on the host, each with room for all parameters. */
struct check_room {
    float *values, *changed; /* of one tensor */
    float *gradients;        /* of all tensors, laid out as the model's */
    float *dense;            /* the same of the dense mode */
};

/**
 * Compares the gradient of one tensor with central differences of the loss, (f(+h) - f(-h)) / 2h in
 * double precision: along the gradient itself, where the slope is its norm, and along a random
 * direction.
 *
 * @return the larger of the two differences, over the gradient's norm; NaN for a gradient of zeros.
 */
static double check_tensor(struct bert *m, const struct tensor *t, const float *gradient,
                           uint64_t *state, const struct check_room *room)
{
    const double h = 2.5e-3, norm = norm_of(gradient, elements(t));
    struct engine *e = &m->engine;
    double worst = 0.0;
    download(e, room->values, t->value, bytes_of(t));
    for (int direction = 0; direction < 2; direction++) {
        double loss[2], slope = 0.0;
        uint64_t signs = *state;
        for (int side = 0; side < 2; side++) {
            *state = signs; /* the same direction on both sides */
            slope = 0.0;
            for (int64_t j = 0; j < elements(t); j++) {
                double along = (double)gradient[j] / norm;
                if (direction == 1 && (random_next(state) & 1) != 0) {
                    along = -along;
                }
                slope += along * (double)gradient[j];
                room->changed[j] = room->values[j] + (float)(side == 0 ? h * along : -h * along);
            }
            upload(e, t->value, room->changed, bytes_of(t));
            loss[side] = bert_forward(m);
        }
        upload(e, t->value, room->values, bytes_of(t));
        double error = fabs((loss[0] - loss[1]) / (2 * h) - slope) / norm;
        worst = error <= worst ? worst : error; /* a NaN stays */
    }
    return worst;
}

/** How far a gradient is from another one, over its norm; NaN if either holds one. */
static double apart(const float *gradient, const float *other, int64_t count)
{
    double squares = 0.0;
    for (int64_t j = 0; j < count; j++) {
        double difference = (double)gradient[j] - (double)other[j];
        squares += difference * difference;
    }
    return sqrt(squares) / norm_of(other, count);
}

enum { MAX_LENGTH = 70 };

/** The same batch whatever the mode. */
static void fill(struct bert *m, uint64_t *state)
{
    const int64_t lengths[] = {m->shape.length, 5, 2, 7};
    bert_batch_begin(m);
    for (int64_t s = 0; s < m->shape.batch; s++) {
        int32_t ids[MAX_LENGTH];
        for (int64_t l = 0; l < lengths[s]; l++) {
            ids[l] = (int32_t)random_below(state, m->shape.vocabulary);
        }
        bert_batch_add(m, ids, lengths[s], (int)random_below(state, m->shape.classes));
    }
}

/** One mode; dense comes first and leaves its gradients in the room. */
static int check_mode(struct bert *m, enum bert_mode mode, int64_t seed, struct pool *activations,
                      const struct check_room *room)
{
    /* Over 200 seeds the largest error of the slopes was 1.7e-3, from the rounding of the f32
     * forward, and the largest distance from the dense gradient 3.4e-6. */
    const double tolerance = 3e-3, dense_tolerance = 1e-5;
    uint64_t state = (uint64_t)seed;
    /* The modes beside it drop other elements: see models/bert.h. */
    const bool like_dense = m->shape.dropout == 0.0 || mode <= BERT_SKIP_BACKWARD;
    int64_t agree = 0;
    double worst = 0.0, farthest = 0.0;
    m->mode = mode;
    bert_initialise(m, (uint64_t)seed, 0.3f);
    fill(m, &state);
    for (int step = 0; step < 2; step++) { /* the second meets what the first left behind */
        pool_poison(activations);          /* a row that is read but was skipped shows */
        bert_clear(m);
        bert_forward(m);
        bert_backward(m);
    }
    int status = bert_status(m);
    const struct tensor *tensors = m->parameters.tensors;
    download(&m->engine, mode == BERT_DENSE ? room->dense : room->gradients, tensors[0].gradient,
             m->parameters.count * (int64_t)sizeof(float));
    const float *gradients = mode == BERT_DENSE ? room->dense : room->gradients;
    for (int64_t i = 0; i < m->parameters.tensor_count && status == OK; i++) {
        const struct tensor *t = &tensors[i];
        const float *gradient = gradients + (t->gradient - tensors[0].gradient);
        const float *same = like_dense ? room->dense + (gradient - gradients) : gradient;
        double other = apart(gradient, same, elements(t));
        double error = check_tensor(m, t, gradient, &state, room);
        bool right = error <= tolerance && other <= dense_tolerance;
        agree += right;
        worst = error <= worst ? worst : error;
        farthest = other <= farthest ? farthest : other;
        if (!right) {
            status = complain(FAILED,
                              "%s: the gradient of %s.%" PRId64 ".%s is off by %.2g of its norm, "
                              "and from the dense one by %.2g",
                              mode_names[mode], t->name, t->block, t->part, error, other);
        }
    }
    printf("%-12s  %s%" PRId64 " of %" PRId64 " tensors agree; largest error %.1e of the "
           "gradient's norm",
           mode_names[mode], m->shape.dropout > 0.0 ? "with dropout " : "", agree,
           m->parameters.tensor_count, worst);
    if (like_dense) {
        printf(", from the dense one %.1e", farthest);
    }
    putchar('\n');
    return status == OK ? bert_status(m) : status;
}

/** All modes. Texts are short, or one is so long that modes number what they drop differently. */
static int check_modes(sebp_context *context, int64_t seed, double dropout)
{
    const struct bert_shape shape = {.layers = 2,
                                     .hidden = 16,
                                     .heads = 2,
                                     .feed_forward = 40,
                                     .length = dropout > 0.0 ? MAX_LENGTH : 12,
                                     .batch = 4,
                                     .vocabulary = 24,
                                     .classes = 3,
                                     .dropout = dropout};
    struct pool pool = {0}, memory = {.context = context}, activations = {.context = context};
    struct bert m;
    int status = bert_create(&pool, &memory, &activations, context, &shape, &m);
    const int64_t count = m.parameters.count;
    const struct check_room room = {floats(&pool, count), floats(&pool, count),
                                    floats(&pool, count), floats(&pool, count)};
    if (status == OK && pool.failed) {
        status = complain(FAILED, "out of memory for the model");
    }
    for (int mode = 0; mode < BERT_MODES && status == OK; mode++) {
        status = check_mode(&m, (enum bert_mode)mode, seed, &activations, &room);
    }
    bert_destroy(&m);
    pool_free(&activations);
    pool_free(&memory);
    pool_free(&pool);
    return status;
}

int check_gradients(sebp_context *context, int64_t seed)
{
    int status = check_modes(context, seed, 0.0);
    return status == OK ? check_modes(context, seed, 0.2) : status;
}

/* ---- for other programs ---- */

/** Opens DIR/name for writing or appending. */
static FILE *dump_open(const struct options *o, const char *name, const char *how)
{
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/%s", o->dump, name);
    return length < (int)sizeof path ? fopen(path, how) : NULL;
}

static int dump_close(const struct options *o, FILE *file)
{
    bool written = file != NULL && !ferror(file);
    if (file != NULL && fclose(file) != 0) {
        written = false;
    }
    return written ? OK : complain(FAILED, "%s: cannot be written", o->dump);
}

static int dump_settings(const struct bert *m, const struct options *o, int64_t steps)
{
    const sebp_adamw_options adamw = adamw_options(0.0, true);
    FILE *file = dump_open(o, "settings.txt", "w");
    if (file != NULL) {
        fprintf(file,
                "layers %" PRId64 "\nhidden %" PRId64 "\nheads %" PRId64 "\nlength %" PRId64 "\n",
                m->shape.layers, m->shape.hidden, m->shape.heads, m->shape.length);
        fprintf(file, "classes %" PRId64 "\nvocabulary %" PRId64 "\nsteps %" PRId64 "\n",
                m->shape.classes, m->shape.vocabulary, steps);
        fprintf(file, "dropout %g\n", m->shape.dropout);
        fprintf(file, "beta1 %g\nbeta2 %g\nepsilon %g\nweight_decay %g\n", adamw.beta1, adamw.beta2,
                adamw.epsilon, adamw.weight_decay);
        for (int64_t step = 1; step <= steps; step++) {
            fprintf(file, "rate.%" PRId64 " %.9g\n", step, rate_at(o->learning_rate, step, steps));
        }
    }
    return dump_close(o, file);
}

int dump_parameters(const struct bert *m, const struct options *o, int64_t steps)
{
    int status = dump_settings(m, o, steps);
    FILE *tensors = dump_open(o, "tensors.txt", "w");
    FILE *values = dump_open(o, "parameters.f32", "wb");
    for (int64_t i = 0;
         i < m->parameters.tensor_count && tensors != NULL && values != NULL && status == OK; i++) {
        const struct tensor *t = &m->parameters.tensors[i];
        fprintf(tensors, "%s.%" PRId64 ".%s %" PRId64 " %" PRId64 "\n", t->name, t->block, t->part,
                t->rows, t->cols);
        struct pool pool = {0};
        float *value = floats(&pool, elements(t));
        if (pool.failed ||
            sebp_device_download(m->engine.context, value, t->value, bytes_of(t)) != SEBP_SUCCESS) {
            status = complain(FAILED, "%s: the parameters cannot be read", o->dump);
        } else {
            fwrite(value, sizeof(float), (size_t)elements(t), values);
        }
        pool_free(&pool);
    }
    int closed[] = {dump_close(o, tensors), dump_close(o, values)};
    return status != OK ? status : closed[0] != OK ? closed[0] : closed[1];
}

int dump_batch(const struct bert *m, const struct options *o, int64_t step)
{
    FILE *file = dump_open(o, "batches.txt", step == 1 ? "w" : "a");
    for (int64_t s = 0; s < m->batch.count && file != NULL; s++) {
        fprintf(file, "%" PRId64 " %" PRId64, step, m->batch.labels[s]);
        for (int64_t l = 0; l < m->batch.lengths[s]; l++) {
            fprintf(file, " %" PRId64, m->batch.ids[m->batch.starts[s] + l]);
        }
        fputc('\n', file);
    }
    return dump_close(o, file);
}
