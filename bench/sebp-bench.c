/* SPDX-License-Identifier: Apache-2.0 */
/* sebp-bench: verifies and times what the library computes; the options say what. */
#include "attention.h"
#include "choices.h"
#include "layers.h"
#include "machine.h"
#include "methods.h"
#include "options.h"
#include "rows.h"

int main(int argc, char **argv)
{
    options o;
    machine m;
    parse_options(&o, argc, argv);
    open_machine(&m, &o);
    if (o.layer)
        measure_layers(&m, &o);
    else if (o.attention)
        measure_attention(&m, &o);
    else if (o.choices)
        measure_choices(&m, &o);
    else if (o.methods != 0)
        compare_methods(&m, &o);
    else
        compare_rows(&m, &o);
    free_options(&o);
    close_machine(&m);
    return 0;
}
