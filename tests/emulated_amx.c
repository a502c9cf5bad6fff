/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include "emulated_amx.h"
#include "lib/cpu/cpu.h"

#ifdef SEBP_HAVE_AVX512BF16

/* simd/tile_product.c once more, with SEBP_EMULATED_TILES. */
sebp_pack sebp_pack_a_bf16_emulated_amx, sebp_pack_b_bf16_emulated_amx;
sebp_tile sebp_tile_bf16_emulated_amx;
void sebp_configure_tiles_emulated_amx(void);
void sebp_release_tiles_emulated_amx(void);

const sebp_kernels *emulated_amx(void)
{
    static sebp_kernels made;
    made = sebp_kernels_avx512bf16;
    made.isa = "emulated amx";
    made.shape_bf16 = sebp_kernels_scalar.shape_bf16;
    made.pack_a_bf16 = sebp_pack_a_bf16_emulated_amx;
    made.pack_b_bf16 = sebp_pack_b_bf16_emulated_amx;
    made.tile_bf16 = sebp_tile_bf16_emulated_amx;
    made.configure_tiles = sebp_configure_tiles_emulated_amx;
    made.release_tiles = sebp_release_tiles_emulated_amx;
    for (int i = 0; sebp_cpu_tier(i) != NULL; i++) {
        if (sebp_cpu_tier(i) == &sebp_kernels_avx512bf16)
            return &made;
    }
    return NULL;
}

#else

const sebp_kernels *emulated_amx(void)
{
    return NULL;
}

#endif
