/* SPDX-License-Identifier: Apache-2.0 */
/** @file counting.c */
#include "config.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "counting_inside.h"
#include "lib/internal.h"
#include "testing.h"

static bool leaked;

/* ---- its operations ---- */

static sebp_status count_alloc(void *device, int64_t bytes, void **memory)
{
    ENTER(device, SEBP_ERROR_MEMORY);
    *memory = counting_allocate(device, bytes);
    return SEBP_SUCCESS;
}

static void count_free(void *device, void *memory)
{
    counting_return(device, memory);
}

static sebp_status count_upload(void *device, void *to, const void *from, int64_t bytes)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->uploaded += bytes;
    return sebp_cpu_copy(self->cpu, counting_behind(self, to, bytes), from, bytes);
}

static sebp_status count_download(void *device, void *to, const void *from, int64_t bytes)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->downloaded += bytes;
    return sebp_cpu_copy(self->cpu, to, counting_behind(self, from, bytes), bytes);
}

static sebp_status count_synchronize(void *device)
{
    ENTER(device, SEBP_ERROR_BACKEND);
    return SEBP_SUCCESS;
}

static bool count_owns(void *device, const void *memory)
{
    const counting *self = device;
    return (const char *)memory >= self->handles &&
           (const char *)memory < self->handles + COUNTING_ARENA;
}

static void count_let_overlap(void *device, bool overlap)
{
    counting *self = device;
    ck_assert_msg(self->overlaps != overlap, "let_overlap twice");
    self->overlaps = overlap;
}

static const char *count_why(const void *device)
{
    (void)device;
    return "";
}

static int64_t count_max_scratch(const void *device)
{
    return sebp_cpu_max_scratch(((const counting *)device)->cpu);
}

static sebp_status count_reserve_scratch(void *device, int64_t bytes)
{
    counting *self = device;
    counting_return(self, self->scratch);
    self->scratch = NULL;
    if (bytes == 0)
        return SEBP_SUCCESS;
    ENTER(device, SEBP_ERROR_MEMORY);
    if (bytes > count_max_scratch(device))
        return SEBP_ERROR_MEMORY;
    self->scratch = counting_allocate(self, bytes);
    return SEBP_SUCCESS;
}

static void *count_scratch(const void *device)
{
    return ((const counting *)device)->scratch;
}

/* A factor of memory rows x memory columns, of which `rows` are listed. */
static sebp_operand behind_operand(const counting *device, const sebp_operand *operand,
                                   int64_t rows, int64_t cols)
{
    sebp_operand found = *operand;
    found.rows = counting_behind_list(device, operand->rows, rows);
    sebp_matrix lies = sebp_input_view(operand->data, rows, cols, operand->stride, operand->dtype);
    found.data = counting_behind_rows(device, &lies, found.rows, rows).data;
    return found;
}

/* A matrix that has C's rows; NULL: NULL. */
static void *behind_c_rows(const counting *device, const sebp_product *found, const void *data,
                           int64_t stride)
{
    if (data == NULL)
        return NULL;
    sebp_matrix lies = sebp_input_view(data, found->m, found->n, stride, found->c_dtype);
    return counting_behind_rows(device, &lies, found->c_rows, found->m).data;
}

static void behind_product(const counting *device, const sebp_product *product, sebp_product *found)
{
    int64_t m = product->m, n = product->n, k = product->k;
    bool at = product->a.transposed, bt = product->b.transposed;
    *found = *product;
    found->a = behind_operand(device, &product->a, at ? k : m, at ? m : k);
    found->b = behind_operand(device, &product->b, bt ? n : k, bt ? k : n);
    found->c_rows = counting_behind_list(device, product->c_rows, m);
    sebp_matrix c = {product->c, m, n, product->c_stride, product->c_dtype};
    found->c = counting_behind_rows(device, &c, found->c_rows, m).data;
    found->bias =
        counting_behind(device, product->bias, n * (int64_t)sebp_dtype_bytes(product->bias_dtype));
    found->residual = behind_c_rows(device, found, product->residual, product->residual_stride);
    found->activated = behind_c_rows(device, found, product->activated, product->activated_stride);
    found->before = behind_c_rows(device, found, product->before, product->before_stride);
}

static sebp_status count_plan(void *device, sebp_plan *plan)
{
    counting *self = device;
    sebp_plan inner;
    ENTER(device, SEBP_ERROR_MEMORY);
    behind_product(self, &plan->product, &inner.product);
    sebp_status status = sebp_cpu_plan_product(self->cpu, &inner);
    plan->path = inner.path;
    return status;
}

static sebp_status count_run(void *device, sebp_plan *plan)
{
    counting *self = device;
    sebp_plan inner;
    plan->path = "the tests' device failed";
    ENTER(device, SEBP_ERROR_BACKEND);
    behind_product(self, &plan->product, &inner.product);
    sebp_status status = sebp_cpu_plan_product(self->cpu, &inner);
    if (status == SEBP_SUCCESS)
        status = sebp_cpu_run_product(self->cpu, &inner);
    plan->path = inner.path;
    return status;
}

static sebp_status count_packed_make(void *device, int64_t max_bytes, sebp_packed **packed)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_MEMORY);
    sebp_status status = sebp_cpu_packed_make(self->cpu, max_bytes, packed);
    self->packed += status == SEBP_SUCCESS;
    return status;
}

static void count_packed_free(void *device, sebp_packed *packed)
{
    counting *self = device;
    sebp_cpu_packed_free(self->cpu, packed);
    self->packed--;
}

static sebp_status count_scan(void *device, const sebp_matrix *dy, sebp_measure measure,
                              double limit, double *score)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->downloaded += dy->rows * (int64_t)sizeof *score;
    sebp_matrix found = counting_behind_matrix(self, dy);
    return sebp_cpu_scan_rows(self->cpu, &found, measure, limit, score);
}

static sebp_status count_zero(void *device, const sebp_matrix *to, const int64_t *rows,
                              int64_t count)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix found = counting_behind_matrix(self, to);
    return sebp_cpu_zero_other_rows(self->cpu, &found, counting_behind_list(self, rows, count),
                                    count);
}

static sebp_status count_sum(void *device, const sebp_matrix *from, const int64_t *rows,
                             int64_t count, const sebp_matrix *to, bool accumulate)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    const int64_t *list = counting_behind_list(self, rows, count);
    sebp_matrix source = counting_behind_rows(self, from, list, count),
                found = counting_behind_matrix(self, to);
    return sebp_cpu_sum_rows(self->cpu, &source, list, count, &found, accumulate);
}

static sebp_status count_widen(void *device, const sebp_matrix *from, const int64_t *rows,
                               const float *weights, int64_t count, const sebp_matrix *to)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    const int64_t *list = counting_behind_list(self, rows, count);
    sebp_matrix source = counting_behind_rows(self, from, list, count),
                found = counting_behind_matrix(self, to);
    const float *scale = counting_behind(self, weights, count * (int64_t)sizeof *weights);
    return sebp_cpu_widen_rows(self->cpu, &source, list, scale, count, &found);
}

static sebp_status count_adamw(void *device, const sebp_adamw_options *options, int64_t step,
                               const sebp_matrix *gradient, const sebp_matrix *w,
                               const sebp_matrix *moment1, const sebp_matrix *moment2,
                               bool step_alone)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix g = counting_behind_matrix(self, gradient), to = counting_behind_matrix(self, w);
    sebp_matrix m = counting_behind_matrix(self, moment1),
                v = counting_behind_matrix(self, moment2);
    return sebp_cpu_adamw(self->cpu, options, step, &g, &to, &m, &v, step_alone);
}

static sebp_status count_scale(void *device, const sebp_matrix *matrix, double factor)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix found = counting_behind_matrix(self, matrix);
    return sebp_cpu_scale(self->cpu, &found, factor);
}

static sebp_status count_add_stochastic(void *device, const sebp_matrix *d, double keep,
                                        uint64_t seed, uint64_t offset, const sebp_matrix *w)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix to = counting_behind_matrix(self, w), from = {0};
    if (d != NULL)
        from = counting_behind_matrix(self, d);
    return sebp_cpu_add_stochastic(self->cpu, d == NULL ? NULL : &from, keep, seed, offset, &to);
}

static sebp_status count_check(void *device, const int64_t *indices, int64_t count, int64_t end,
                               bool *valid)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->downloaded++;
    return sebp_cpu_check_indices(self->cpu, counting_behind_list(self, indices, count), count, end,
                                  valid);
}

static sebp_status count_take(void *device, const sebp_matrix *from, int64_t first,
                              const sebp_sparse *kept)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix source = counting_behind_matrix(self, from);
    sebp_sparse found = counting_behind_sparse(self, kept);
    return sebp_cpu_take_elements(self->cpu, &source, first, &found);
}

static sebp_status count_add(void *device, const sebp_sparse *s, const sebp_matrix *to)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_sparse source = counting_behind_sparse(self, s);
    sebp_matrix found = counting_behind_matrix(self, to);
    return sebp_cpu_add_elements(self->cpu, &source, &found);
}

static sebp_status count_top_begin(void *device, int64_t k, sebp_top **top)
{
    ENTER(device, SEBP_ERROR_MEMORY);
    return sebp_cpu_top_begin(((counting *)device)->cpu, k, top);
}

static sebp_status count_top_feed(void *device, sebp_top *top, const sebp_matrix *panel,
                                  int64_t first)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix found = counting_behind_matrix(self, panel);
    return sebp_cpu_top_feed(self->cpu, top, &found, first);
}

static sebp_status count_top_finish(void *device, const sebp_top *top, const sebp_sparse *to)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_sparse found = counting_behind_sparse(self, to);
    return sebp_cpu_top_finish(self->cpu, top, &found);
}

static void count_top_end(void *device, sebp_top *top)
{
    sebp_cpu_top_end(((counting *)device)->cpu, top);
}

static sebp_status count_sampled(void *device, const sebp_sampled *product)
{
    counting *self = device;
    ENTER(device, product->sums == NULL ? SEBP_ERROR_MEMORY : SEBP_ERROR_BACKEND);
    const sebp_sparse kept = counting_behind_sparse(self, product->kept);
    sebp_sampled found = *product;
    found.a = behind_operand(self, &product->a, product->m, kept.rows);
    found.b = behind_operand(self, &product->b, product->m, kept.cols);
    found.kept = &kept;
    found.sums = counting_behind(self, product->sums, kept.count * (int64_t)sizeof(float));
    return sebp_cpu_sampled_product(self->cpu, &found);
}

static bool count_sampled_is_cheaper(const void *device, const sebp_sampled *product)
{
    return sebp_cpu_sampled_is_cheaper(((const counting *)device)->cpu, product);
}

static sebp_status count_update(void *device, const sebp_sparse *s, const sebp_matrix *out,
                                const sebp_matrix *in, const sebp_matrix *w)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_sparse source = counting_behind_sparse(self, s);
    sebp_matrix left = counting_behind_matrix(self, out), right = counting_behind_matrix(self, in);
    sebp_matrix found = counting_behind_matrix(self, w);
    return sebp_cpu_sparse_update(self->cpu, &source, &left, &right, &found);
}

static sebp_status count_eigenvectors(void *device, const sebp_matrix *sum,
                                      const sebp_matrix *vectors, float *values,
                                      char why[SEBP_WHY_BYTES])
{
    strcpy(why, "the tests' device failed");
    ENTER(device, SEBP_ERROR_BACKEND);
    return sebp_cpu_eigenvectors(((counting *)device)->cpu, sum, vectors, values, why);
}

static int64_t count_scratch_bytes(const void *device)
{
    return sebp_cpu_scratch_bytes(((const counting *)device)->cpu);
}

static void count_info(const void *device, sebp_info *info)
{
    sebp_cpu_info(((const counting *)device)->cpu, info);
}

static void count_destroy(void *device)
{
    counting *self = device;
    leaked = self->live != 0 || self->packed != 0;
    sebp_cpu_destroy(self->cpu);
    munmap(self->handles, COUNTING_ARENA);
    munmap(self->memory, COUNTING_ARENA);
    free(self);
}

const sebp_backend counting_backend = {
    .name = "counting",
    .uses_host_memory = false,
    .let_overlap = count_let_overlap,
    .owns = count_owns,
    .why = count_why,
    .alloc = count_alloc,
    .free = count_free,
    .upload = count_upload,
    .download = count_download,
    .synchronize = count_synchronize,
    .reserve_scratch = count_reserve_scratch,
    .max_scratch = count_max_scratch,
    .scratch = count_scratch,
    .plan_product = count_plan,
    .run_product = count_run,
    .packed_make = count_packed_make,
    .packed_forget = sebp_cpu_packed_forget,
    .packed_bytes = sebp_cpu_packed_bytes,
    .packed_free = count_packed_free,
    .scan_rows = count_scan,
    .zero_other_rows = count_zero,
    .sum_rows = count_sum,
    .widen_rows = count_widen,
    .adamw = count_adamw,
    .scale = count_scale,
    .add_stochastic = count_add_stochastic,
    .check_indices = count_check,
    .take_elements = count_take,
    .add_elements = count_add,
    .top_begin = count_top_begin,
    .top_feed = count_top_feed,
    .top_finish = count_top_finish,
    .top_end = count_top_end,
    .sampled_product = count_sampled,
    .sampled_is_cheaper = count_sampled_is_cheaper,
    .sparse_update = count_update,
    .attention_forward = counting_attention_forward,
    .attention_backward = counting_attention_backward,
    .eigenvectors = count_eigenvectors,
    .norm_forward = counting_norm_forward,
    .norm_backward = counting_norm_backward,
    .activation = counting_activation,
    .dropout = counting_dropout,
    .rotary = counting_rotary,
    .cross_entropy = counting_cross_entropy,
    .sum_losses = counting_sum_losses,
    .gather = counting_gather,
    .sum_groups = counting_sum_groups,
    .scratch_bytes = count_scratch_bytes,
    .info = count_info,
    .destroy = count_destroy,
};

/* ---- for the tests ---- */

counting *counting_make(void)
{
    const sebp_context_options options = {
        .threads = 2, .gemm = SEBP_GEMM_NATIVE, .workspace_bytes = (int64_t)4 << 20};
    const sebp_cpu_environment environment = {0};
    counting *device = calloc(1, sizeof *device);
    ck_assert_ptr_nonnull(device);
    ck_assert_int_eq(sebp_cpu_create(&options, &environment, &device->cpu), SEBP_SUCCESS);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    device->handles = mmap(NULL, COUNTING_ARENA, PROT_NONE, flags, -1, 0);
    device->memory = mmap(NULL, COUNTING_ARENA, PROT_READ | PROT_WRITE, flags, -1, 0);
    ck_assert(device->handles != MAP_FAILED && device->memory != MAP_FAILED);
    leaked = false;
    return device;
}

sebp_context *counting_context(counting **device)
{
    sebp_context *context;
    *device = counting_make();
    ck_assert_int_eq(sebp_context_make(&counting_backend, *device, false, &context), SEBP_SUCCESS);
    return context;
}

void counting_fail_at(counting *device, int64_t n)
{
    device->fails_at = n > 0 ? device->operations + n : 0;
}

int64_t counting_operations(const counting *device)
{
    return device->operations;
}

int64_t counting_uploaded(const counting *device)
{
    return device->uploaded;
}

int64_t counting_downloaded(const counting *device)
{
    return device->downloaded;
}

int64_t counting_live(const counting *device)
{
    return device->live;
}

int counting_has_leaked(void)
{
    return leaked;
}
