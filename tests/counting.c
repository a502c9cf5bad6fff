/* SPDX-License-Identifier: Apache-2.0 */
/** @file counting.c */
#include "config.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "counting.h"
#include "lib/cpu/operations.h"
#include "lib/internal.h"
#include "testing.h"

enum { BLOCKS = 4096, GAP = 4096 };
static const size_t ARENA = (size_t)1 << 30;

/* A piece of memory that is allocated. */
typedef struct device_memory {
    size_t first, bytes; /* within the arena */
} device_memory;

struct counting {
    sebp_cpu *cpu;
    char *handles; /* pages that nobody may touch */
    char *memory;  /* what lies behind them */
    device_memory pieces[BLOCKS];
    int live;
    size_t used; /* of the arena */
    void *scratch;
    int64_t operations, fails_at, uploaded, downloaded;
};

static bool leaked;

/* ---- its memory ---- */

/* What lies behind `bytes` from a pointer into the device's memory on. */
static void *behind(const counting *device, const void *pointer, int64_t bytes)
{
    if (pointer == NULL || bytes <= 0)
        return NULL;
    const char *at = pointer;
    ck_assert_msg(at >= device->handles && at < device->handles + ARENA,
                  "a device was handed memory of the host");
    size_t first = (size_t)(at - device->handles);
    for (int i = 0; i < device->live; i++) {
        const device_memory *piece = &device->pieces[i];
        if (first >= piece->first && first + (size_t)bytes <= piece->first + piece->bytes)
            return device->memory + first;
    }
    ck_abort_msg("a device was handed memory that is not allocated");
}

static void *take(counting *device, int64_t bytes)
{
    size_t room = (size_t)sebp_round_up(bytes > 0 ? bytes : 1, 64);
    ck_assert_int_lt(device->live, BLOCKS);
    if (device->live == 0)
        device->used = 0;
    ck_assert_msg(device->used + room + GAP <= ARENA, "the tests' device is full");
    device->pieces[device->live++] = (device_memory){device->used, room};
    char *handle = device->handles + device->used;
    memset(device->memory + device->used, TESTING_POISON, room);
    device->used += room + GAP;
    return handle;
}

static void give(counting *device, void *handle)
{
    for (int i = 0; i < device->live && handle != NULL; i++) {
        if (device->handles + device->pieces[i].first == (char *)handle) {
            device->pieces[i] = device->pieces[--device->live];
            return;
        }
    }
    ck_assert_msg(handle == NULL, "a device was to free what it has not allocated");
}

static int64_t bytes_of(const sebp_matrix *matrix)
{
    if (matrix->rows == 0 || matrix->cols == 0)
        return 0;
    return ((matrix->rows - 1) * matrix->stride + matrix->cols) *
           (int64_t)sebp_dtype_bytes(matrix->dtype);
}

static sebp_matrix behind_matrix(const counting *device, const sebp_matrix *matrix)
{
    sebp_matrix found = *matrix;
    found.data = behind(device, matrix->data, bytes_of(matrix));
    return found;
}

/* Of a matrix whose rows are listed only so far as the list goes. */
static sebp_matrix behind_rows(const counting *device, const sebp_matrix *matrix,
                               const int64_t *rows, int64_t count)
{
    sebp_matrix used = *matrix;
    used.rows = rows != NULL ? (count > 0 ? rows[count - 1] + 1 : 0) : count;
    used.data = behind(device, matrix->data, bytes_of(&used));
    used.rows = matrix->rows;
    return used;
}

static const int64_t *behind_list(const counting *device, const int64_t *rows, int64_t count)
{
    return behind(device, rows, count * (int64_t)sizeof *rows);
}

static sebp_sparse behind_sparse(const counting *device, const sebp_sparse *sparse)
{
    sebp_sparse found = *sparse;
    found.indices = behind(device, sparse->indices, sparse->count * (int64_t)sizeof(int64_t));
    found.values = behind(device, sparse->values, sparse->count * (int64_t)sizeof(float));
    return found;
}

/* ---- its operations ---- */

/* Counts an operation; false where it is to fail. */
static bool enter(void *device)
{
    counting *self = device;
    return ++self->operations != self->fails_at;
}

#define ENTER(device, status)                                                                      \
    do {                                                                                           \
        if (!enter(device))                                                                        \
            return status;                                                                         \
    } while (0)

static sebp_status count_alloc(void *device, int64_t bytes, void **memory)
{
    ENTER(device, SEBP_ERROR_MEMORY);
    *memory = take(device, bytes);
    return SEBP_SUCCESS;
}

static void count_free(void *device, void *memory)
{
    give(device, memory);
}

static sebp_status count_upload(void *device, void *to, const void *from, int64_t bytes)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->uploaded += bytes;
    return sebp_cpu_copy(self->cpu, behind(self, to, bytes), from, bytes);
}

static sebp_status count_download(void *device, void *to, const void *from, int64_t bytes)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->downloaded += bytes;
    return sebp_cpu_copy(self->cpu, to, behind(self, from, bytes), bytes);
}

static sebp_status count_synchronize(void *device)
{
    ENTER(device, SEBP_ERROR_BACKEND);
    return SEBP_SUCCESS;
}

static int64_t count_max_scratch(const void *device)
{
    return sebp_cpu_max_scratch(((const counting *)device)->cpu);
}

static sebp_status count_reserve_scratch(void *device, int64_t bytes)
{
    counting *self = device;
    give(self, self->scratch);
    self->scratch = NULL;
    if (bytes == 0)
        return SEBP_SUCCESS;
    ENTER(device, SEBP_ERROR_MEMORY);
    if (bytes > count_max_scratch(device))
        return SEBP_ERROR_MEMORY;
    self->scratch = take(self, bytes);
    return SEBP_SUCCESS;
}

static void *count_scratch(const void *device)
{
    return ((const counting *)device)->scratch;
}

/* A factor of memory rows x memory columns, of which `rows` are listed. */
static sebp_operand behind_operand(const counting *device, const sebp_operand *operand,
                                   sebp_dtype dtype, int64_t rows, int64_t cols)
{
    sebp_operand found = *operand;
    found.rows = behind_list(device, operand->rows, rows);
    sebp_matrix lies = sebp_input_view(operand->data, rows, cols, operand->stride, dtype);
    found.data = behind_rows(device, &lies, found.rows, rows).data;
    return found;
}

static void behind_product(const counting *device, const sebp_product *product, sebp_product *found)
{
    int64_t m = product->m, n = product->n, k = product->k;
    bool at = product->a.transposed, bt = product->b.transposed;
    *found = *product;
    found->a = behind_operand(device, &product->a, product->dtype, at ? k : m, at ? m : k);
    found->b = behind_operand(device, &product->b, product->dtype, bt ? n : k, bt ? k : n);
    found->c_rows = behind_list(device, product->c_rows, m);
    sebp_matrix c = {product->c, m, n, product->c_stride, product->c_dtype};
    found->c = behind_rows(device, &c, found->c_rows, m).data;
    found->bias = behind(device, product->bias, n * (int64_t)sebp_dtype_bytes(product->bias_dtype));
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

static sebp_status count_scan(void *device, const sebp_matrix *dy, sebp_measure measure,
                              double limit, double *score)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->downloaded += dy->rows * (int64_t)sizeof *score;
    sebp_matrix found = behind_matrix(self, dy);
    return sebp_cpu_scan_rows(self->cpu, &found, measure, limit, score);
}

static sebp_status count_zero(void *device, const sebp_matrix *to, const int64_t *rows,
                              int64_t count)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix found = behind_matrix(self, to);
    return sebp_cpu_zero_other_rows(self->cpu, &found, behind_list(self, rows, count), count);
}

static sebp_status count_sum(void *device, const sebp_matrix *from, const int64_t *rows,
                             int64_t count, const sebp_matrix *to, bool accumulate)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    const int64_t *list = behind_list(self, rows, count);
    sebp_matrix source = behind_rows(self, from, list, count), found = behind_matrix(self, to);
    return sebp_cpu_sum_rows(self->cpu, &source, list, count, &found, accumulate);
}

static sebp_status count_widen(void *device, const sebp_matrix *from, const int64_t *rows,
                               int64_t count, const sebp_matrix *to)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    const int64_t *list = behind_list(self, rows, count);
    sebp_matrix source = behind_rows(self, from, list, count), found = behind_matrix(self, to);
    return sebp_cpu_widen_rows(self->cpu, &source, list, count, &found);
}

static sebp_status count_adamw(void *device, const sebp_adamw_options *options, int64_t step,
                               const sebp_matrix *gradient, const sebp_matrix *w,
                               const sebp_matrix *moment1, const sebp_matrix *moment2,
                               bool step_alone)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix g = behind_matrix(self, gradient), to = behind_matrix(self, w);
    sebp_matrix m = behind_matrix(self, moment1), v = behind_matrix(self, moment2);
    return sebp_cpu_adamw(self->cpu, options, step, &g, &to, &m, &v, step_alone);
}

static sebp_status count_scale(void *device, const sebp_matrix *matrix, double factor)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix found = behind_matrix(self, matrix);
    return sebp_cpu_scale(self->cpu, &found, factor);
}

static sebp_status count_check(void *device, const int64_t *indices, int64_t count, int64_t end,
                               bool *valid)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    self->downloaded++;
    return sebp_cpu_check_indices(self->cpu, behind_list(self, indices, count), count, end, valid);
}

static sebp_status count_take(void *device, const sebp_matrix *from, const sebp_sparse *kept)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_matrix source = behind_matrix(self, from);
    sebp_sparse found = behind_sparse(self, kept);
    return sebp_cpu_take_elements(self->cpu, &source, &found);
}

static sebp_status count_add(void *device, const sebp_sparse *s, const sebp_matrix *to)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_sparse source = behind_sparse(self, s);
    sebp_matrix found = behind_matrix(self, to);
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
    sebp_matrix found = behind_matrix(self, panel);
    return sebp_cpu_top_feed(self->cpu, top, &found, first);
}

static sebp_status count_top_finish(void *device, const sebp_top *top, const sebp_sparse *to)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_sparse found = behind_sparse(self, to);
    return sebp_cpu_top_finish(self->cpu, top, &found);
}

static void count_top_end(void *device, sebp_top *top)
{
    sebp_cpu_top_end(((counting *)device)->cpu, top);
}

static sebp_status count_update(void *device, const sebp_sparse *s, const sebp_matrix *out,
                                const sebp_matrix *in, const sebp_matrix *w)
{
    counting *self = device;
    ENTER(device, SEBP_ERROR_BACKEND);
    sebp_sparse source = behind_sparse(self, s);
    sebp_matrix left = behind_matrix(self, out), right = behind_matrix(self, in);
    sebp_matrix found = behind_matrix(self, w);
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
    leaked = self->live != 0;
    sebp_cpu_destroy(self->cpu);
    munmap(self->handles, ARENA);
    munmap(self->memory, ARENA);
    free(self);
}

const sebp_backend counting_backend = {
    .name = "counting",
    .uses_host_memory = false,
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
    .scan_rows = count_scan,
    .zero_other_rows = count_zero,
    .sum_rows = count_sum,
    .widen_rows = count_widen,
    .adamw = count_adamw,
    .scale = count_scale,
    .check_indices = count_check,
    .take_elements = count_take,
    .add_elements = count_add,
    .top_begin = count_top_begin,
    .top_feed = count_top_feed,
    .top_finish = count_top_finish,
    .top_end = count_top_end,
    .sparse_update = count_update,
    .eigenvectors = count_eigenvectors,
    .scratch_bytes = count_scratch_bytes,
    .info = count_info,
    .destroy = count_destroy,
};

/* ---- for the tests ---- */

counting *counting_make(void)
{
    const sebp_context_options options = {.threads = 2, .workspace_bytes = (int64_t)4 << 20};
    const sebp_cpu_environment environment = {0};
    counting *device = calloc(1, sizeof *device);
    ck_assert_ptr_nonnull(device);
    ck_assert_int_eq(sebp_cpu_create(&options, &environment, &device->cpu), SEBP_SUCCESS);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    device->handles = mmap(NULL, ARENA, PROT_NONE, flags, -1, 0);
    device->memory = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, flags, -1, 0);
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

sebp_matrix counting_put(counting *device, const sebp_matrix *matrix)
{
    sebp_matrix put = *matrix;
    int64_t bytes = bytes_of(matrix);
    put.data = take(device, bytes);
    if (bytes > 0)
        memcpy(behind(device, put.data, bytes), matrix->data, (size_t)bytes);
    return put;
}

void counting_get(counting *device, const sebp_matrix *from, const sebp_matrix *to)
{
    int64_t bytes = bytes_of(from);
    if (bytes > 0)
        memcpy(to->data, behind(device, from->data, bytes), (size_t)bytes);
}

void counting_free(counting *device, void *memory)
{
    give(device, memory);
}

sebp_sparse counting_put_sparse(counting *device, const sebp_sparse *sparse)
{
    sebp_sparse put = *sparse;
    int64_t index_bytes = sparse->count * (int64_t)sizeof *put.indices;
    int64_t value_bytes = sparse->count * (int64_t)sizeof *put.values;
    put.indices = take(device, index_bytes);
    put.values = take(device, value_bytes);
    if (sparse->count > 0) {
        memcpy(behind(device, put.indices, index_bytes), sparse->indices, (size_t)index_bytes);
        memcpy(behind(device, put.values, value_bytes), sparse->values, (size_t)value_bytes);
    }
    return put;
}

void counting_get_sparse(counting *device, const sebp_sparse *from, const sebp_sparse *to)
{
    int64_t index_bytes = from->count * (int64_t)sizeof *from->indices;
    int64_t value_bytes = from->count * (int64_t)sizeof *from->values;
    if (from->count > 0) {
        memcpy(to->indices, behind(device, from->indices, index_bytes), (size_t)index_bytes);
        memcpy(to->values, behind(device, from->values, value_bytes), (size_t)value_bytes);
    }
}

void counting_free_sparse(counting *device, sebp_sparse *sparse)
{
    give(device, sparse->indices);
    give(device, sparse->values);
}
