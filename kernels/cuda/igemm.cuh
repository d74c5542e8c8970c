// Grouped INT8 convolution: every branch of a layer in one launch, as an implicit GEMM on the tensor core.
//
// Tensors lie in blocks of 16 channels (16 bytes of one pixel), in any layout that a pixel stride and an offset per
// block describe: NHWC, or planes of 16 or 32 channels. A branch is a set of output blocks together with the input
// blocks it reads; selecting channels is therefore addressing, and blocks that nobody reads are not touched.
//
// K is one sequence of 16-byte chunks, each one (tap, block): only its end is padded, to 4 chunks. Rows are pixels,
// columns are output channels. Three stages of shared memory are filled by cp.async; a row's four chunks are swizzled
// so that neither the copies nor ldmatrix meet a bank twice. The epilogue is one fused multiply-add and one rounding,
// so that a device and a CPU agree bit for bit.
#pragma once
#include "device.cuh"

// 16 bytes of K: where they lie from the output pixel's first input pixel, and by how many pixels they are displaced.
struct alignas(8) Chunk {
    s32 offset;
    s16 dy, dx;
};

// Output rows [first_row, first_row + rows) of the packed arrays; chunks and weights [rows][padded chunks * 16].
struct alignas(16) Branch {
    s32 first_chunk, chunks, weights, rows;
    s32 first_row, spare[3];
};

struct alignas(16) Tile {
    s32 branch, pixel, row, spare;
};

struct IgemmParams {
    const s8* x;
    const s8* weights;
    const Chunk* chunks;
    const Branch* branches;
    const Tile* tiles;
    const s32* blocks;        // [rows / 16] offset of each output block from its pixel, in elements of y
    const FloatPair* affine;  // [rows] (scale, bias) in steps of y
    const s8* skip;           // same layout as y, or null
    void* y;                  // s8, or float where `floats` is set
    s32 height, width, out_width, out_plane, pixels;  // out_plane: pixels of one output image; pixels: of all
    s32 stride_y, stride_x, pad_y, pad_x;
    s32 x_image, x_pixel, y_image, y_pixel;           // strides: bytes of x, elements of y
    float low, high, skip_scale;
    s32 floats;
};

namespace igemm {

constexpr s32 kStages = 3;
constexpr s32 kChunks = 4;             // of a row in one stage
constexpr s32 kRowBytes = 16 * kChunks;
constexpr s32 kOutside = -(1 << 20);   // a coordinate that no tap brings back into the image
constexpr s32 kNone = -16;             // no offset, yet aligned: cp.async is given it, and reads nothing
constexpr s16 kNowhere = -32768;       // a tap that leads out of every image: sides are shorter

template <s32 kTileM, s32 kTileN, s32 kWarpM, s32 kWarpN>
struct Shape {
    static constexpr s32 kThreads = 32 * (kTileM / kWarpM) * (kTileN / kWarpN);
    static constexpr s32 kLoadRows = kThreads / kChunks;  // rows that all threads fetch at once
    static constexpr s32 kLoadsA = kTileM / kLoadRows, kLoadsB = kTileN / kLoadRows;
    static constexpr s32 kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
    static constexpr s32 kStageBytes = (kTileM + kTileN) * kRowBytes;
    static constexpr s32 kOutRow = kTileN + 16;           // bytes; 16 more, so that rows start in other banks
    static constexpr s32 kTileBlocks = kTileN / 16;
};

// Two rows share 128 bytes, all banks; rows 2i and 2i + 1 keep chunk c at place c ^ (i % 4).
IGATE_DEVICE s32 swizzled(s32 row, s32 chunk) {
    return row * kRowBytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// What one thread fetches: chunk `column` of some pixels and of some weight rows.
template <typename S>
struct Loader {
    s32 column, row;
    s32 base[S::kLoadsA], y[S::kLoadsA], x[S::kLoadsA];
    const s8* weights;
    s32 weight_stride, weight_rows;

    IGATE_DEVICE Loader(const IgemmParams& p, const Branch& branch, const Tile& tile, s32 thread)
        : column(thread % kChunks), row(thread / kChunks) {
        for (s32 i = 0; i < S::kLoadsA; ++i) {
            const s32 pixel = tile.pixel + row + i * S::kLoadRows;
            const s32 image = pixel / p.out_plane, place = pixel % p.out_plane;
            y[i] = place / p.out_width * p.stride_y - p.pad_y;
            x[i] = place % p.out_width * p.stride_x - p.pad_x;
            base[i] = image * p.x_image + (y[i] * p.width + x[i]) * p.x_pixel;
            if (pixel >= p.pixels) y[i] = kOutside;
        }
        weight_stride = (branch.chunks + kChunks - 1) / kChunks * kRowBytes;
        weight_rows = branch.rows - tile.row - row;
        weights = p.weights + branch.weights + (tile.row + row) * weight_stride + column * 16;
    }

    // This thread's chunk of a step; beyond the last one a chunk that lies outside of every image.
    IGATE_DEVICE Chunk chunk(const IgemmParams& p, const Branch& branch, s32 step) const {
        const s32 index = step * kChunks + column;
        return index < branch.chunks ? load(p.chunks + branch.first_chunk + index) : Chunk{0, kNowhere, 0};
    }

    IGATE_DEVICE void fetch(const IgemmParams& p, const Chunk& at, s32 step, s8* stage) const {
        for (s32 i = 0; i < S::kLoadsA; ++i) {
            const bool inside = static_cast<u32>(y[i] + at.dy) < static_cast<u32>(p.height) &&
                                static_cast<u32>(x[i] + at.dx) < static_cast<u32>(p.width);
            cp_async16(stage + swizzled(row + i * S::kLoadRows, column), p.x + (base[i] + at.offset), inside);
        }
        stage += S::kLoadsA * S::kLoadRows * kRowBytes;
        for (s32 i = 0; i < S::kLoadsB; ++i) {
            const s8* from = weights + i * S::kLoadRows * weight_stride + step * kRowBytes;
            cp_async16(stage + swizzled(row + i * S::kLoadRows, column), from, i * S::kLoadRows < weight_rows);
        }
    }
};

template <typename S, s32 kTileM, s32 kWarpM, s32 kWarpN>
IGATE_DEVICE void multiply(const s8* stage, s32 warp_m, s32 warp_n, s32 lane, s32 (&acc)[S::kMmaM][S::kMmaN][4]) {
    const s8* const b_rows = stage + kTileM * kRowBytes;
#pragma unroll
    for (s32 half = 0; half < kChunks / 2; ++half) {  // 32 bytes of K each
        u32 a[S::kMmaM][4], b[S::kMmaN / 2][4];
#pragma unroll
        for (s32 i = 0; i < S::kMmaM; ++i) {
            ldmatrix_x4(a[i], stage + swizzled(warp_m * kWarpM + i * 16 + lane % 16, half * 2 + lane / 16));
        }
#pragma unroll
        for (s32 j = 0; j < S::kMmaN / 2; ++j) {
            const s32 row = warp_n * kWarpN + j * 16 + lane % 8 + lane / 16 * 8;
            ldmatrix_x4(b[j], b_rows + swizzled(row, half * 2 + lane / 8 % 2));
        }
#pragma unroll
        for (s32 i = 0; i < S::kMmaM; ++i) {
#pragma unroll
            for (s32 j = 0; j < S::kMmaN; ++j) {
                mma_s8(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

// Offset of an output block in elements of y, or kNone where this tile has no such pixel or no such block.
IGATE_DEVICE s32 out_offset(const IgemmParams& p, const Branch& branch, const Tile& tile, s32 row, s32 block) {
    const s32 pixel = tile.pixel + row, channel = tile.row + block * 16;
    if (pixel >= p.pixels || channel >= branch.rows) return kNone;
    const s32 image = pixel / p.out_plane, place = pixel % p.out_plane;
    return image * p.y_image + place * p.y_pixel + load(p.blocks + (branch.first_row + channel) / 16);
}

// Calls `use(row in the tile, channel in the tile, accumulator index i, j, pair)` for each pair of neighbours.
template <typename S, s32 kWarpM, s32 kWarpN, typename Use>
IGATE_DEVICE void each_pair(s32 warp_m, s32 warp_n, s32 lane, const Use& use) {
#pragma unroll
    for (s32 i = 0; i < S::kMmaM; ++i) {
#pragma unroll
        for (s32 j = 0; j < S::kMmaN; ++j) {
#pragma unroll
            for (s32 pair = 0; pair < 2; ++pair) {
                use(warp_m * kWarpM + i * 16 + lane / 4 + pair * 8, warp_n * kWarpN + j * 8 + lane % 4 * 2, i, j, pair);
            }
        }
    }
}

template <s32 kTileM, s32 kTileN, s32 kWarpM, s32 kWarpN>
IGATE_DEVICE void run(const IgemmParams& p) {
    using S = Shape<kTileM, kTileN, kWarpM, kWarpN>;
    IGATE_SHARED(shared);
    const s32 thread = static_cast<s32>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const s32 warp_m = warp / (kTileN / kWarpN), warp_n = warp % (kTileN / kWarpN);
    const Tile tile = load(p.tiles + blockIdx.x);
    const Branch branch = load(p.branches + tile.branch);
    const Loader<S> loader(p, branch, tile, thread);
    const s32 steps = (branch.chunks + kChunks - 1) / kChunks;
    s32 acc[S::kMmaM][S::kMmaN][4] = {};

    for (s32 step = 0; step < kStages - 1; ++step) {
        if (step < steps) loader.fetch(p, loader.chunk(p, branch, step), step, shared + step * S::kStageBytes);
        cp_async_commit();
    }
    s32 full = 0, empty = kStages - 1;  // the stage to multiply next, the one to fill next
    for (s32 step = 0; step < steps; ++step) {
        const s32 ahead = step + kStages - 1;
        const Chunk at = loader.chunk(p, branch, ahead);  // on its way while this step's stage is waited for
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this step's stage has arrived for all, and nobody reads the one that is filled next
        if (ahead < steps) loader.fetch(p, at, ahead, shared + empty * S::kStageBytes);
        cp_async_commit();
        multiply<S, kTileM, kWarpM, kWarpN>(shared + full * S::kStageBytes, warp_m, warp_n, lane, acc);
        full = full + 1 == kStages ? 0 : full + 1;
        empty = empty + 1 == kStages ? 0 : empty + 1;
    }

    const FloatPair* affine = p.affine + branch.first_row + tile.row;
    if (p.floats != 0) {
        each_pair<S, kWarpM, kWarpN>(warp_m, warp_n, lane, [&](s32 row, s32 channel, s32 i, s32 j, s32 pair) {
            const s32 offset = out_offset(p, branch, tile, row, channel / 16);
            if (offset < 0) return;
            const FloatPair one = load(affine + channel), two = load(affine + channel + 1);
            const FloatPair value = {__fmaf_rn(__int2float_rn(acc[i][j][pair * 2]), one.first, one.second),
                                     __fmaf_rn(__int2float_rn(acc[i][j][pair * 2 + 1]), two.first, two.second)};
            store(reinterpret_cast<FloatPair*>(static_cast<float*>(p.y) + offset + channel % 16), value);
        });
        return;
    }

    __syncthreads();  // the last stages are read: their memory now takes the output tile
    if (p.skip != nullptr) {
        for (s32 i = thread; i < kTileM * S::kTileBlocks; i += S::kThreads) {
            const s32 row = i / S::kTileBlocks, block = i % S::kTileBlocks;
            const s32 offset = out_offset(p, branch, tile, row, block);
            cp_async16(shared + row * S::kOutRow + block * 16, p.skip + offset, offset >= 0);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    }
    each_pair<S, kWarpM, kWarpN>(warp_m, warp_n, lane, [&](s32 row, s32 channel, s32 i, s32 j, s32 pair) {
        if (tile.row + channel >= branch.rows) return;
        const FloatPair one = load(affine + channel), two = load(affine + channel + 1);
        float first = __fmaf_rn(__int2float_rn(acc[i][j][pair * 2]), one.first, one.second);
        float second = __fmaf_rn(__int2float_rn(acc[i][j][pair * 2 + 1]), two.first, two.second);
        Pair* const place = reinterpret_cast<Pair*>(shared + row * S::kOutRow + channel);
        if (p.skip != nullptr) {
            first = __fmaf_rn(__int2float_rn(place->first), p.skip_scale, first);
            second = __fmaf_rn(__int2float_rn(place->second), p.skip_scale, second);
        }
        *place = Pair{static_cast<s8>(rounded(first, p.low, p.high)), static_cast<s8>(rounded(second, p.low, p.high))};
    });
    __syncthreads();
    for (s32 i = thread; i < kTileM * S::kTileBlocks; i += S::kThreads) {
        const s32 row = i / S::kTileBlocks, block = i % S::kTileBlocks;
        const s32 offset = out_offset(p, branch, tile, row, block);
        if (offset < 0) continue;
        const Vec16 bytes = *reinterpret_cast<const Vec16*>(shared + row * S::kOutRow + block * 16);
        store(reinterpret_cast<Vec16*>(static_cast<s8*>(p.y) + offset), bytes);
    }
}

}  // namespace igemm

// Small layers and short latency; the default; many pixels and channels.
IGATE_KERNEL(igemm_s8_64x32, IgemmParams, 128, 6) {
    igemm::run<64, 32, 16, 32>(p);
}
IGATE_KERNEL(igemm_s8_64x64, IgemmParams, 128, 5) {
    igemm::run<64, 64, 32, 32>(p);
}
IGATE_KERNEL(igemm_s8_128x64, IgemmParams, 128, 3) {
    igemm::run<128, 64, 64, 32>(p);
}
