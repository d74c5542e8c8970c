// The mix of a gated site where it must lie in memory: psi' = sum over tasks of w_t * (phi_t where selected, else psi).
//
// One thread makes 16 channels of one pixel. psi, all phi_t and the result lie in tensors of 16-channel blocks; a block
// that no channel selects is not loaded. A channel that no task selects is psi itself, bit for bit.
#pragma once
#include "device.cuh"

struct MergeParams {
    const s8* x;           // psi and the own channels of all tasks: the one tensor of the site
    s8* y;
    const s32* sources;    // [blocks][1 + tasks] offsets from the pixel: of psi's block, then of each task's
    const u16* masks;      // [blocks][tasks] bit c: channel c of the block is the task's own
    const float* weights;  // [blocks][tasks][16] in steps of y for one step of x; of all tasks of a channel
    const s32* targets;    // [blocks] offsets of the result
    s32 blocks, tasks, pixels, plane;  // plane: pixels of one image
    s32 x_image, x_pixel, y_image, y_pixel;
};

namespace merge {

IGATE_DEVICE void run(const MergeParams& p) {
    const s32 index = static_cast<s32>(blockIdx.x * 128 + threadIdx.x);
    const s32 pixel = index / p.blocks, block = index % p.blocks;
    if (pixel >= p.pixels) return;
    const s32 image = pixel / p.plane, place = pixel % p.plane;
    const s8* const from = p.x + image * p.x_image + place * p.x_pixel;
    const s32* const sources = p.sources + block * (1 + p.tasks);
    u32 all = 0xffff, any = 0;
    for (s32 t = 0; t < p.tasks; ++t) {
        const u32 mask = load(p.masks + block * p.tasks + t);
        all &= mask;
        any |= mask;
    }
    const Vec16 nothing = {{0, 0, 0, 0}};
    const Vec16 psi = all == 0xffff ? nothing : load(reinterpret_cast<const Vec16*>(from + load(sources)));
    float sums[16] = {};
    for (s32 t = 0; t < p.tasks; ++t) {
        const u32 mask = load(p.masks + block * p.tasks + t);
        const Vec16 own = mask == 0 ? nothing : load(reinterpret_cast<const Vec16*>(from + load(sources + 1 + t)));
        const float* const weights = p.weights + (block * p.tasks + t) * 16;
#pragma unroll
        for (s32 c = 0; c < 16; ++c) {
            const s32 value = (mask >> c & 1) != 0 ? byte_of(own, c) : byte_of(psi, c);
            sums[c] = __fmaf_rn(load(weights + c), __int2float_rn(value), sums[c]);
        }
    }
    Vec16 out = nothing;
#pragma unroll
    for (s32 c = 0; c < 16; ++c) {
        const s32 value = (any >> c & 1) != 0 ? rounded(sums[c], -128.0f, 127.0f) : byte_of(psi, c);
        out.word[c / 4] |= (static_cast<u32>(value) & 0xff) << (c % 4 * 8);
    }
    store(reinterpret_cast<Vec16*>(p.y + image * p.y_image + place * p.y_pixel + load(p.targets + block)), out);
}

}  // namespace merge

IGATE_KERNEL(merge_s8, MergeParams, 128, 8) {
    merge::run(p);
}
