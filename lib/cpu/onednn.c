/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file onednn.c
 * The one file that knows oneDNN, of the 2.x and the 3.x API.
 *
 * oneDNN takes dense matrices, so rows are gathered into panels before a product and scattered, or
 * expanded in place, after it. f32 goes through dnnl_sgemm, which has no primitive to create; bf16
 * through the matmul primitive, which oneDNN's own cache keeps for the shapes that come again.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdio.h>
#include <string.h>

#include <dnnl.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "product.h"

enum { PANEL_ROWS = 1024 }; /* rows gathered at a time, at most */

static int64_t element_bytes(const sebp_product *product)
{
    return (int64_t)sebp_dtype_bytes(product->dtype);
}

static sebp_onednn_plan make_plan(const sebp_cpu *cpu, const sebp_product *product)
{
    sebp_onednn_plan plan = {.panels_of_k = product->a.transposed &&
                                            (product->a.rows != NULL || product->b.rows != NULL)};
    if (plan.panels_of_k) {
        plan.row_bytes = ((product->a.rows != NULL ? product->m : 0) +
                          (product->b.rows != NULL ? product->n : 0)) *
                         element_bytes(product);
        plan.rows = product->k;
    } else {
        plan.expand = product->c_rows != NULL && product->other_rows_are_free;
        plan.scatter = product->c_rows != NULL && !plan.expand;
        plan.row_bytes =
            (product->a.rows != NULL ? product->k * element_bytes(product) : 0) +
            (plan.scatter ? product->n * (int64_t)sebp_dtype_bytes(product->c_dtype) : 0);
        plan.rows = product->m;
    }
    if (plan.row_bytes > 0) {
        plan.rows =
            sebp_min(sebp_min(plan.rows, PANEL_ROWS), sebp_cpu_workspace(cpu) / plan.row_bytes);
    }
    return plan;
}

const char *sebp_onednn_plan_product(const sebp_cpu *cpu, const sebp_product *product,
                                     sebp_onednn_plan *plan)
{
    if (sebp_cpu_is_forked(cpu))
        return "native:forked";
    if (cpu->parallel_for != NULL)
        return "native:host-pool";
    if (product->k == 0)
        return "native:empty";
    if (product->residual != NULL)
        return "native:residual";
    if (!product->a.transposed && product->b.rows != NULL)
        return "native:gathered-depth";
    if (product->a.transposed && product->c_rows != NULL)
        return "native:scattered-transpose";
    *plan = make_plan(cpu, product);
    if (plan->panels_of_k && (product->b.transposed || product->bias != NULL))
        return "native:gathered-transpose";
    if (plan->rows == 0)
        return "native:workspace";
    if (product->dtype == SEBP_F32)
        return product->c_dtype == SEBP_F32 ? NULL : "native:mixed-dtypes";
    if (!cpu->kernels->bf16_dots)
        return "native:no-bf16";
    if (product->k % 2 != 0)
        return "native:odd-depth"; /* measured: many times slower */
    if (product->c_dtype == SEBP_BF16 && (product->accumulate || product->bias != NULL ||
                                          (plan->panels_of_k && plan->rows < product->k))) {
        return "native:rounds-once"; /* oneDNN would round the sum before all is added */
    }
    return NULL;
}

int64_t sebp_onednn_scratch(const sebp_onednn_plan *plan)
{
    return plan->rows * plan->row_bytes;
}

/* One dense product, row-major: C (+)= op(A) op(B). */
typedef struct dense_product {
    int64_t m, n, k;
    sebp_dtype dtype, c_dtype;
    const void *a, *b;
    void *c;
    int64_t a_stride, b_stride, c_stride;
    bool a_transposed, b_transposed, accumulate;
} dense_product;

#if SEBP_ONEDNN_MAJOR >= 3

typedef dnnl_memory_desc_t description;

static dnnl_status_t describe(description *to, const dnnl_dims_t dims, dnnl_data_type_t type,
                              const dnnl_dims_t strides)
{
    return dnnl_memory_desc_create_with_strides(to, 2, dims, type, strides);
}

static const_dnnl_memory_desc_t described(const description *of)
{
    return *of;
}

static void forget(description *of)
{
    if (*of)
        dnnl_memory_desc_destroy(*of);
}

static dnnl_status_t describe_matmul(dnnl_primitive_desc_t *to, const description of[3],
                                     dnnl_primitive_attr_t attributes, dnnl_engine_t engine)
{
    return dnnl_matmul_primitive_desc_create(to, engine, of[0], of[1], NULL, of[2], attributes);
}

static dnnl_status_t append_sum(dnnl_post_ops_t operations)
{
    return dnnl_post_ops_append_sum(operations, 1.0f, 0, dnnl_data_type_undef);
}

#else

typedef dnnl_memory_desc_t description;

static dnnl_status_t describe(description *to, const dnnl_dims_t dims, dnnl_data_type_t type,
                              const dnnl_dims_t strides)
{
    return dnnl_memory_desc_init_by_strides(to, 2, dims, type, strides);
}

static const dnnl_memory_desc_t *described(const description *of)
{
    return of;
}

static void forget(description *of)
{
    (void)of;
}

static dnnl_status_t describe_matmul(dnnl_primitive_desc_t *to, const description of[3],
                                     dnnl_primitive_attr_t attributes, dnnl_engine_t engine)
{
    dnnl_matmul_desc_t matmul;
    dnnl_status_t status = dnnl_matmul_desc_init(&matmul, &of[0], &of[1], NULL, &of[2]);
    if (status == dnnl_success)
        status = dnnl_primitive_desc_create(to, &matmul, attributes, engine, NULL);
    return status;
}

static dnnl_status_t append_sum(dnnl_post_ops_t operations)
{
    return dnnl_post_ops_append_sum(operations, 1.0f);
}

#endif

static dnnl_data_type_t data_type(sebp_dtype dtype)
{
    return dtype == SEBP_F32 ? dnnl_f32 : dnnl_bf16;
}

/* What oneDNN makes for one product; NULL: not made. */
typedef struct matmul_objects {
    dnnl_engine_t engine;
    dnnl_primitive_attr_t attributes;
    dnnl_post_ops_t operations;
    description of[3]; /* A, B, C */
    dnnl_primitive_desc_t recipe;
    dnnl_primitive_t primitive;
    dnnl_stream_t stream;
    dnnl_exec_arg_t arguments[3];
} matmul_objects;

static dnnl_status_t describe_matrices(const dense_product *dense, description of[3])
{
    dnnl_dims_t dims[3] = {{dense->m, dense->k}, {dense->k, dense->n}, {dense->m, dense->n}};
    dnnl_dims_t strides[3] = {{dense->a_stride, 1}, {dense->b_stride, 1}, {dense->c_stride, 1}};
    if (dense->a_transposed)
        strides[0][0] = 1, strides[0][1] = dense->a_stride;
    if (dense->b_transposed)
        strides[1][0] = 1, strides[1][1] = dense->b_stride;
    dnnl_status_t status = dnnl_success;
    for (int i = 0; i < 3 && status == dnnl_success; i++) {
        status =
            describe(&of[i], dims[i], data_type(i < 2 ? dense->dtype : dense->c_dtype), strides[i]);
    }
    return status;
}

static dnnl_status_t make_matmul(const dense_product *dense, matmul_objects *made)
{
    static const int names[3] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
    /* oneDNN has plain pointers also to what it only reads. */
    void *data[3] = {(void *)(uintptr_t)dense->a, (void *)(uintptr_t)dense->b, dense->c};
    dnnl_status_t status = dnnl_engine_create(&made->engine, dnnl_cpu, 0);
    if (status == dnnl_success)
        status = describe_matrices(dense, made->of);
    if (status == dnnl_success)
        status = dnnl_primitive_attr_create(&made->attributes);
    if (status == dnnl_success && dense->accumulate) {
        status = dnnl_post_ops_create(&made->operations);
        if (status == dnnl_success)
            status = append_sum(made->operations);
        if (status == dnnl_success)
            status = dnnl_primitive_attr_set_post_ops(made->attributes, made->operations);
    }
    if (status == dnnl_success)
        status = describe_matmul(&made->recipe, made->of, made->attributes, made->engine);
    if (status == dnnl_success)
        status = dnnl_primitive_create(&made->primitive, made->recipe);
    if (status == dnnl_success)
        status = dnnl_stream_create(&made->stream, made->engine, dnnl_stream_default_flags);
    for (int i = 0; i < 3 && status == dnnl_success; i++) {
        made->arguments[i].arg = names[i];
        status = dnnl_memory_create(&made->arguments[i].memory, described(&made->of[i]),
                                    made->engine, data[i]);
    }
    return status;
}

static void destroy_matmul(matmul_objects *made)
{
    for (int i = 0; i < 3; i++) {
        if (made->arguments[i].memory != NULL)
            dnnl_memory_destroy(made->arguments[i].memory);
        forget(&made->of[i]);
    }
    if (made->stream != NULL)
        dnnl_stream_destroy(made->stream);
    if (made->primitive != NULL)
        dnnl_primitive_destroy(made->primitive);
    if (made->recipe != NULL)
        dnnl_primitive_desc_destroy(made->recipe);
    if (made->operations != NULL)
        dnnl_post_ops_destroy(made->operations);
    if (made->attributes != NULL)
        dnnl_primitive_attr_destroy(made->attributes);
    if (made->engine != NULL)
        dnnl_engine_destroy(made->engine);
}

static dnnl_status_t matmul(const dense_product *dense)
{
    matmul_objects made;
    memset(&made, 0, sizeof made);
    dnnl_status_t status = make_matmul(dense, &made);
    if (status == dnnl_success)
        status = dnnl_primitive_execute(made.primitive, made.stream, 3, made.arguments);
    if (status == dnnl_success)
        status = dnnl_stream_wait(made.stream);
    destroy_matmul(&made);
    return status;
}

static dnnl_status_t multiply(const dense_product *dense)
{
    if (dense->dtype == SEBP_BF16)
        return matmul(dense);
    return dnnl_sgemm(dense->a_transposed ? 'T' : 'N', dense->b_transposed ? 'T' : 'N', dense->m,
                      dense->n, dense->k, 1.0f, dense->a, dense->a_stride, dense->b,
                      dense->b_stride, dense->accumulate ? 1.0f : 0.0f, dense->c, dense->c_stride);
}

/* Rows moved by all threads: each takes an even part of the list. */
typedef struct row_move {
    const sebp_kernels *kernels;
    char *to;
    int64_t to_stride;
    const int64_t *to_rows;
    const char *from;
    int64_t from_stride;
    const int64_t *from_rows;
    int64_t count, row_bytes, pieces;
} row_move;

static void move_piece(void *work, int64_t piece)
{
    const row_move *move = work;
    int64_t first = move->count * piece / move->pieces;
    int64_t count = move->count * (piece + 1) / move->pieces - first;
    move->kernels->move_rows(
        move->to + (move->to_rows != NULL ? 0 : first * move->to_stride), move->to_stride,
        move->to_rows != NULL ? move->to_rows + first : NULL,
        move->from + (move->from_rows != NULL ? 0 : first * move->from_stride), move->from_stride,
        move->from_rows != NULL ? move->from_rows + first : NULL, count, move->row_bytes);
}

/* Gathers `count` of an operand's memory rows, `cols` wide, from the `first` of its list on, into
 * *scratch, which then moves on. Without a list the rows stay where they are. Returns their
 * address. */
static const void *take_rows(sebp_cpu *cpu, const sebp_operand *operand, int64_t element,
                             int64_t first, int64_t count, int64_t cols, char **scratch,
                             int64_t *stride)
{
    *stride = operand->stride;
    if (operand->rows == NULL)
        return (const char *)operand->data + first * operand->stride * element;
    row_move move = {cpu->kernels,          *scratch,
                     cols * element,        NULL,
                     operand->data,         operand->stride * element,
                     operand->rows + first, count,
                     cols * element,        cpu->threads};
    sebp_cpu_parallel(cpu, move.pieces, move_piece, &move);
    const char *rows = *scratch;
    *scratch += count * cols * element;
    *stride = cols;
    return rows;
}

/* Copies the bias into the first row, and that row into the others. */
static void fill_bias(sebp_cpu *cpu, const sebp_product *product, float *c, int64_t stride,
                      int64_t rows)
{
    int64_t row_bytes = product->n * (int64_t)sizeof *c;
    if (product->bias_dtype == SEBP_BF16)
        cpu->kernels->f32_from_bf16(c, product->bias, product->n);
    else
        memcpy(c, product->bias, (size_t)row_bytes);
    row_move move = {cpu->kernels,
                     (char *)(c + stride),
                     stride * (int64_t)sizeof *c,
                     NULL,
                     (char *)c,
                     0,
                     NULL,
                     rows - 1,
                     row_bytes,
                     cpu->threads};
    sebp_cpu_parallel(cpu, move.pieces, move_piece, &move);
}

/* dW: the gathered rows are steps of the depth, and panels add up in C. */
static dnnl_status_t product_over_depth(sebp_cpu *cpu, const sebp_product *product, int64_t rows,
                                        char *scratch)
{
    dnnl_status_t status = dnnl_success;
    for (int64_t at = 0; at < product->k && status == dnnl_success; at += rows) {
        int64_t count = sebp_min(rows, product->k - at), element = element_bytes(product);
        char *room = scratch;
        dense_product dense = {.m = product->m,
                               .n = product->n,
                               .k = count,
                               .dtype = product->dtype,
                               .c_dtype = product->c_dtype,
                               .c = product->c,
                               .c_stride = product->c_stride,
                               .a_transposed = true,
                               .accumulate = at > 0 || product->accumulate};
        dense.a =
            take_rows(cpu, &product->a, element, at, count, product->m, &room, &dense.a_stride);
        dense.b =
            take_rows(cpu, &product->b, element, at, count, product->n, &room, &dense.b_stride);
        status = multiply(&dense);
    }
    return status;
}

/* Y and dX: the gathered rows are rows of A and of C. */
static dnnl_status_t product_over_rows(sebp_cpu *cpu, const sebp_product *product,
                                       const sebp_onednn_plan *plan, char *scratch)
{
    dnnl_status_t status = dnnl_success;
    int64_t element = element_bytes(product);
    int64_t c_element = (int64_t)sebp_dtype_bytes(product->c_dtype);
    for (int64_t at = 0; at < product->m && status == dnnl_success; at += plan->rows) {
        int64_t count = sebp_min(plan->rows, product->m - at);
        char *room = scratch;
        dense_product dense = {.m = count,
                               .n = product->n,
                               .k = product->k,
                               .dtype = product->dtype,
                               .c_dtype = product->c_dtype,
                               .a_stride = product->a.stride,
                               .b = product->b.data,
                               .b_stride = product->b.stride,
                               .a_transposed = product->a.transposed,
                               .b_transposed = product->b.transposed,
                               .accumulate = product->accumulate || product->bias != NULL};
        if (product->a.transposed) { /* not gathered, so there is only one panel */
            dense.a = product->a.data;
        } else {
            dense.a =
                take_rows(cpu, &product->a, element, at, count, product->k, &room, &dense.a_stride);
        }
        const int64_t *c_rows = product->c_rows != NULL ? product->c_rows + at : NULL;
        dense.c = (char *)product->c + at * product->c_stride * c_element;
        dense.c_stride = product->c_stride;
        row_move back = {cpu->kernels, product->c, product->c_stride * c_element,
                         c_rows,       room,       product->n * c_element,
                         NULL,         count,      product->n * c_element,
                         cpu->threads};
        if (plan->scatter) {
            dense.c = room;
            dense.c_stride = product->n;
            if (product->accumulate) {
                row_move bring = {cpu->kernels, room,       product->n * c_element,
                                  NULL,         product->c, product->c_stride * c_element,
                                  c_rows,       count,      product->n * c_element,
                                  cpu->threads};
                sebp_cpu_parallel(cpu, bring.pieces, move_piece, &bring);
            }
        }
        if (product->bias != NULL)
            fill_bias(cpu, product, dense.c, dense.c_stride, count);
        status = multiply(&dense);
        if (plan->scatter && status == dnnl_success)
            sebp_cpu_parallel(cpu, back.pieces, move_piece, &back);
    }
    if (plan->expand && status == dnnl_success) {
        cpu->kernels->expand_rows(product->c, product->c_stride * c_element, product->c_rows,
                                  product->m, product->n * c_element);
    }
    return status;
}

sebp_status sebp_onednn_product(sebp_cpu *cpu, const sebp_product *product,
                                const sebp_onednn_plan *plan, void *scratch, const char **why)
{
#ifdef _OPENMP
    int threads = omp_get_max_threads(); /* of this thread; oneDNN runs with as many */
    omp_set_num_threads(cpu->threads);
#endif
    dnnl_status_t status = plan->panels_of_k ? product_over_depth(cpu, product, plan->rows, scratch)
                                             : product_over_rows(cpu, product, plan, scratch);
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    if (status == dnnl_success)
        return SEBP_SUCCESS;
    *why = status == dnnl_out_of_memory ? "oneDNN has no memory" : "oneDNN failed";
    return SEBP_ERROR_BACKEND;
}

void sebp_onednn_version(char *text, size_t bytes)
{
    const dnnl_version_t *version = dnnl_version();
    snprintf(text, bytes, "%d.%d.%d", version->major, version->minor, version->patch);
}
