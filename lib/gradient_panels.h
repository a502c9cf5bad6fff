/* SPDX-License-Identifier: Apache-2.0 */
/** @file gradient_panels.h For methods that read all of dW once and keep little of it. */
#ifndef SEBP_LIB_GRADIENT_PANELS_H
#define SEBP_LIB_GRADIENT_PANELS_H

#include "call.h"

/** What is done with rows of dW, f32; `first` is the index of their first element. It keeps its failure
 * in the call. */
typedef void sebp_use_panel(sebp_call *call, void *work, const sebp_matrix *panel, int64_t first);

/**
 * dW = dY[R]^T X[R], dY having M rows, in panels of its rows: each is handed to `use` as soon as it is
 * done, in order. They lie in the scratch memory reserved for the method, which is given back. Fails with
 * SEBP_ERROR_MEMORY where a row does not fit, before the first panel.
 *
 * @return who computed the last product, as a plan's path; NULL after a failure before it.
 */
const char *sebp_gradient_panels(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                                 sebp_use_panel *use, void *work);

#endif
