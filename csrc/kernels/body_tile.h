/* SPDX-License-Identifier: Apache-2.0 */
/* The tile that takes most of prefill's time: TILE_M x TILE_N dot products in registers, all operands float32.
 *
 * A dot product has 16 lanes. Where a register holds 8, a tile runs over the lower halves of the blocks of 16 inputs
 * and then over the upper ones: the same 16 lanes, a full-size tile. Between chunks of 512 inputs the lanes are kept in
 * memory, so blocking never changes the order of additions.
 *
 * Both operands are first packed in the order in which the tile reads them. Rows of x often lie a multiple of 4 KB
 * apart (24 KB at F = 6144), where they evict each other from the caches' few ways: packing 512 such rows again for
 * every 32 weight rows took a third of the time (one Zen 5 core). So pack_rows packs x once for all weights, and matmul
 * packs it only for keys of attention, whose rows are short. Packing the weights costs 2 to 4 %.
 *
 * The sums of a block have 16 lanes each, the largest of what lies in the second-level cache: for 72 rows of x and 64 of
 * w 295 KB, besides 131 KB of weights. Processors with AVX-512 have caches for twice the rows of x.
 */
enum { N_HALVES = 16 / VEC_LANES, TILE_LANES = TILE_M * TILE_N * 16 };

/* sum[half][i][j] += x_i * w_j over n_blocks of 16 inputs. x [half][block][TILE_M][VEC_LANES], w with TILE_N. */
static void tile(const float *x, const float *w, int n_blocks, float *acc, bool first)
{
    for (int half = 0; half < N_HALVES; half++) {
        vec sum[TILE_M][TILE_N], xs[TILE_M];
        for (int i = 0; i < TILE_M; i++)
            for (int j = 0; j < TILE_N; j++)
                sum[i][j] = first ? vec_zero() : vec_load(acc + (i * TILE_N + j) * VEC_LANES);
        for (int b = 0; b < n_blocks; b++) {
            for (int i = 0; i < TILE_M; i++)
                xs[i] = vec_load(x + i * VEC_LANES);
            for (int j = 0; j < TILE_N; j++) {
                vec ws = vec_load(w + j * VEC_LANES);
                for (int i = 0; i < TILE_M; i++)
                    sum[i][j] = vec_fma(xs[i], ws, sum[i][j]);
            }
            x += TILE_M * VEC_LANES;
            w += TILE_N * VEC_LANES;
        }
        for (int i = 0; i < TILE_M; i++)
            for (int j = 0; j < TILE_N; j++)
                vec_store(acc + (i * TILE_N + j) * VEC_LANES, sum[i][j]);
        acc += TILE_M * TILE_N * VEC_LANES;
    }
}

/* The address of block b of row r in packed tiles of tile_rows rows. Its upper half lies half_stride further. */
#define PACKED(tiles, tile_rows, n_blocks, r, b)                                       \
    ((tiles) + (size_t)((r) / (tile_rows)) * (size_t)((tile_rows) * (n_blocks) * 16) + \
     (size_t)((b) * (tile_rows) + (r) % (tile_rows)) * VEC_LANES)
#define HALF_STRIDE(tile_rows, n_blocks) ((size_t)((n_blocks) * (tile_rows)) * VEC_LANES)

/* Packs m rows of x, k inputs each. The last block is padded with zeros; rows that fill up the last tile are zero. */
static void pack_x(const float *x, size_t x_stride, int m, int k, float *packed)
{
    const int n_blocks = (k + 15) / 16, n_whole = k / 16;
    const size_t half_stride = HALF_STRIDE(TILE_M, n_blocks);
    for (int i = 0; i < (m + TILE_M - 1) / TILE_M * TILE_M; i++) {
        const float *row = x + (size_t)i * x_stride;
        for (int b = 0; b < n_blocks; b++) {
            f32x16 block = i >= m        ? x16_set1(0)
                           : b < n_whole ? x16_load(row + b * 16)
                                         : x16_load_some(row + b * 16, k - b * 16);
            x16_store_halves(PACKED(packed, TILE_M, n_blocks, i, b), half_stride, block);
        }
    }
}

/* Where pack_rows puts inputs [l, l + 512) of a block of rows, from row i on, of m rows of k inputs. */
static size_t packed_block(int m, int k, int i, int l)
{
    const size_t block_m = (size_t)(m - i < BLOCK_M ? m - i : BLOCK_M);
    return (size_t)i * g4_packed_inputs((size_t)k) + (size_t)l * g4_packed_rows(block_m);
}

static void pack_rows(const float *x, size_t x_stride, int m, int k, int first, int end, float *packed)
{
    _Static_assert(BLOCK_M % G4_PACK_UNIT == 0 && G4_PACK_UNIT % TILE_M == 0, "a worker packs whole tiles of a block");
    for (int i = first; i < end; i += G4_PACK_UNIT)
        for (int l = 0; l < k; l += BLOCK_K) {
            const int length = k - l < BLOCK_K ? k - l : BLOCK_K, block = i / BLOCK_M * BLOCK_M;
            pack_x(x + (size_t)i * x_stride + l, x_stride, m - i < G4_PACK_UNIT ? m - i : G4_PACK_UNIT, length,
                   packed + packed_block(m, k, block, l) + (size_t)(i - block) * g4_packed_inputs((size_t)length));
        }
}

/* x in the outer loop: its tile is read once from far away, and stays in the first-level cache while the tiles of w
 * stream past. Meanwhile the next tile of x is prefetched, at the end the first of the next inputs, which lies there
 * (512 x 6144 on one Zen 4 core: 78 -> 91 GFLOP/s). */
static void tile_block(const float *x, int m, const float *w, int n, int n_blocks, float *acc, bool first)
{
    const size_t x_tile = (size_t)(TILE_M * n_blocks * 16), w_tile = (size_t)(TILE_N * n_blocks * 16);
    const int n_tiles = (n + TILE_N - 1) / TILE_N;
    const size_t part = (x_tile / 16 + (size_t)n_tiles - 1) / (size_t)n_tiles * 64; /* bytes, whole cache lines */
    for (int i = 0; i < (m + TILE_M - 1) / TILE_M; i++, x += x_tile)
        for (int j = 0; j < n_tiles; j++) {
            prefetch_ahead(x + x_tile, part, (size_t)j * part);
            tile(x, w + (size_t)j * w_tile, n_blocks, acc + (j * (BLOCK_M / TILE_M) + i) * TILE_LANES, first);
        }
}

/* Adds up all lanes into out [m, n]. */
static void sum_block(const float *acc, int m, int n, float *out, size_t out_stride)
{
    _Static_assert(TILE_N == 4, "x16_sum4 takes a tile's row");
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j += TILE_N) {
            const float *lanes = acc + ((j / TILE_N) * (BLOCK_M / TILE_M) + i / TILE_M) * TILE_LANES;
            float sums[TILE_N];
            x16_sum4(lanes + i % TILE_M * TILE_N * VEC_LANES, TILE_M * TILE_N * VEC_LANES, sums);
            memcpy(out + (size_t)i * out_stride + j, sums, (size_t)(n - j < TILE_N ? n - j : TILE_N) * sizeof *sums);
        }
}
