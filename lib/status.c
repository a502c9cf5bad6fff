/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file status.c
 * A line for each status.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <sebp/sebp.h>

const char *sebp_status_string(sebp_status status)
{
    switch (status) {
    case SEBP_SUCCESS:
        return "success";
    case SEBP_ERROR_NULL:
        return "a pointer that may not be NULL is NULL";
    case SEBP_ERROR_SIZE:
        return "a negative size, or a struct of a size or with a tail that this version does not "
               "know";
    case SEBP_ERROR_DTYPE:
        return "an unknown dtype, or dtypes that do not go together";
    case SEBP_ERROR_STRIDE:
        return "a stride smaller than the number of columns";
    case SEBP_ERROR_OVERFLOW:
        return "sizes whose product does not fit in memory";
    case SEBP_ERROR_SHAPE:
        return "shapes that do not go together";
    case SEBP_ERROR_ROWS:
        return "row indices out of range, unsorted or repeated, or a row set made for another M";
    case SEBP_ERROR_VALUE:
        return "an option or argument outside its range";
    case SEBP_ERROR_ALIAS:
        return "an output overlaps an input or another output";
    case SEBP_ERROR_MEMORY:
        return "memory could not be had, or the workspace bound is too small";
    case SEBP_ERROR_UNSUPPORTED:
        return "this build or this machine lacks what was asked for";
    case SEBP_ERROR_ENVIRONMENT:
        return "an environment variable holds a value it may not hold";
    case SEBP_ERROR_BACKEND:
        return "a library underneath failed";
    case SEBP_ERROR_NONFINITE:
        return "a NaN or Inf where there must be none";
    case SEBP_ERROR_FILE:
        return "a file that cannot be read or written, or holds something else";
    }
    return "unknown status";
}
