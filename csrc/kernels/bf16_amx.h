/* SPDX-License-Identifier: Apache-2.0 */
/* Matmul of tiles (body_bf16.h) with AMX. One instruction multiplies 16 x 32 by 32 x 16: 8192 multiply-adds in 16
 * cycles. 4 of the 8 tile registers keep sums; each of the other 4 is loaded once for two products. */
/* 8 full tiles. Not built on the stack: gcc 12's intrinsic is declared to read only 8 bytes, so gcc could drop stores
 * to the other 56. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} whole_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static INLINE void tiles_begin(void) { _tile_loadconfig(&whole_tiles); }

/* Without the release, the operating system saves 8 KB of tiles at every thread switch. */
static INLINE void tiles_end(void) { _tile_release(); }

/* A compiler barrier: compilers do not know that tile loads and stores access memory. Earlier stores must complete
 * before it, and later loads must not move above it. */
static INLINE void memory_settles(void) { __asm__ volatile("" ::: "memory"); }

static INLINE void tile_products(const int rows, const int columns, const uint16_t *w, size_t w_stride,
                                 const uint16_t *x, size_t x_stride, int n_tiles, tile_sums sums, bool add)
{
    enum { ROW = 64 };
    const size_t w_bytes = w_stride * sizeof *w, sum_bytes = sums.stride * sizeof *sums.at;
    float *below = sums.at + sums.down;
    memory_settles();
    if (add) {
        _tile_loadd(0, sums.at, sum_bytes);
        if (columns > 1)
            _tile_loadd(1, sums.at + sums.right, sum_bytes);
        if (rows > 1)
            _tile_loadd(2, below, sum_bytes);
        if (rows > 1 && columns > 1)
            _tile_loadd(3, below + sums.right, sum_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int t = 0; t < n_tiles; t++, x += G4_TILE, w += G4_TILE_INPUTS) {
        _tile_loadd(4, w, w_bytes);
        _tile_loadd(6, x, ROW);
        _tile_dpbf16ps(0, 4, 6);
        if (columns > 1) {
            _tile_loadd(7, x + x_stride, ROW);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows > 1) {
            _tile_loadd(5, w + G4_TILE_ROWS * w_stride, w_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (rows > 1 && columns > 1)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums.at, sum_bytes);
    if (columns > 1)
        _tile_stored(1, sums.at + sums.right, sum_bytes);
    if (rows > 1)
        _tile_stored(2, below, sum_bytes);
    if (rows > 1 && columns > 1)
        _tile_stored(3, below + sums.right, sum_bytes);
    memory_settles();
}
