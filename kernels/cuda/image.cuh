// Pictures in and out: camera frame -> network input; network output -> class map, metres, unit vectors.
//
// Every resize is bilinear between two rows and two columns that a table names, with shares of 1/2048, in integers: the
// same on every machine. What follows is a fixed order of single-rounding operations.
#pragma once
#include "device.cuh"

// Of one target row or column: two source indices and the share of the second in 1/2048; low < 0: outside the picture.
struct alignas(8) Tap {
    s16 low, high, share, spare;
};

struct PreprocessParams {
    const u8* frame;   // RGB, three bytes a pixel; of NV12 the luma plane
    const u8* chroma;  // of NV12 the half-size plane of (U, V), else null
    const Tap* rows;   // [height], of the frame; then of NV12's chroma plane
    const Tap* columns;
    const Tap* chroma_rows;
    const Tap* chroma_columns;
    s8* y;
    s32 height, width, frame_row, chroma_row;  // *_row: bytes from a row to the next one
    s32 vector;                                // bytes written for each pixel (or square of pixels): 4, 16 or 32
    s32 fold;                                  // 2: a square of 2x2 pixels is one pixel of 12 channels; else 1
    float scale[3], bias[3];                   // steps of y for one 1/255: value * scale + bias
    float matrix[9];                           // of NV12: RGB = matrix (Y - luma, U - 128, V - 128)
    float luma;
    s32 pad[3];                                // steps of y where the picture has no frame
};

struct UpsampleParams {
    const s8* x;
    void* y;           // u8, float or three floats a pixel
    const Tap* rows;   // [height]
    const Tap* columns;
    s32 height, width, x_width, x_pixel, channels;
    s32 x_plane;       // bytes of one plane: of all pixels with x_pixel channels each
    float scale, low, high;
};

namespace image {

constexpr s32 kOne = 2048;           // shares sum to this
constexpr float kTwice = 1.0f / (2048.0f * 2048.0f);

IGATE_DEVICE s32 between(s32 a, s32 b, s32 c, s32 d, s32 right, s32 down) {
    return (a * (kOne - right) + b * right) * (kOne - down) + (c * (kOne - right) + d * right) * down;
}

// Channel `offset` of a byte picture whose pixels are `step` bytes apart, in 2048^-2.
IGATE_DEVICE s32 sampled(const u8* picture, s32 row_bytes, s32 step, s32 offset, const Tap& row, const Tap& column) {
    const u8* const top = picture + row.low * row_bytes + offset;
    const u8* const bottom = picture + row.high * row_bytes + offset;
    return between(load(top + column.low * step), load(top + column.high * step), load(bottom + column.low * step),
                   load(bottom + column.high * step), column.share, row.share);
}

IGATE_DEVICE float level(s32 sample) {
    return __fmul_rn(__int2float_rn(sample), kTwice);
}

// The three bytes of the network's pixel (y, x), the first in the lowest bits.
IGATE_DEVICE u32 input_pixel(const PreprocessParams& p, s32 y, s32 x) {
    const Tap row = load(p.rows + y), column = load(p.columns + x);
    s32 steps[3] = {p.pad[0], p.pad[1], p.pad[2]};
    if (row.low >= 0 && column.low >= 0) {
        float colour[3];
        if (p.chroma == nullptr) {
#pragma unroll
            for (s32 c = 0; c < 3; ++c) colour[c] = level(sampled(p.frame, p.frame_row, 3, c, row, column));
        } else {
            const Tap half_row = load(p.chroma_rows + y), half_column = load(p.chroma_columns + x);
            const float luma = __fadd_rn(level(sampled(p.frame, p.frame_row, 1, 0, row, column)), -p.luma);
            const float u = __fadd_rn(level(sampled(p.chroma, p.chroma_row, 2, 0, half_row, half_column)), -128.0f);
            const float v = __fadd_rn(level(sampled(p.chroma, p.chroma_row, 2, 1, half_row, half_column)), -128.0f);
#pragma unroll
            for (s32 c = 0; c < 3; ++c) {
                const float* const m = p.matrix + 3 * c;
                const float value = __fmaf_rn(m[2], v, __fmaf_rn(m[1], u, __fmul_rn(m[0], luma)));
                colour[c] = fminf(fmaxf(value, 0.0f), 255.0f);
            }
        }
#pragma unroll
        for (s32 c = 0; c < 3; ++c) steps[c] = rounded(__fmaf_rn(colour[c], p.scale[c], p.bias[c]), -128.0f, 127.0f);
    }
    return (static_cast<u32>(steps[0]) & 0xff) | (static_cast<u32>(steps[1]) & 0xff) << 8 |
           (static_cast<u32>(steps[2]) & 0xff) << 16;
}

IGATE_DEVICE void preprocess(const PreprocessParams& p) {
    const s32 index = static_cast<s32>(blockIdx.x * 128 + threadIdx.x), width = p.width / p.fold;
    if (index >= p.height / p.fold * width) return;
    const s32 y = index / width * p.fold, x = index % width * p.fold;
    Vec16 out = {{0, 0, 0, 0}};
    if (p.fold == 2) {
        const u32 a = input_pixel(p, y, x), b = input_pixel(p, y, x + 1);
        const u32 c = input_pixel(p, y + 1, x), d = input_pixel(p, y + 1, x + 1);
        out = {{a | b << 24, b >> 8 | c << 16, c >> 16 | d << 8, 0}};
    } else {
        out.word[0] = input_pixel(p, y, x);
    }
    s8* const to = p.y + index * p.vector;
    if (p.vector == 4) {
        store(reinterpret_cast<u32*>(to), out.word[0]);
        return;
    }
    store(reinterpret_cast<Vec16*>(to), out);
    if (p.vector == 32) store(reinterpret_cast<Vec16*>(to + 16), Vec16{{0, 0, 0, 0}});
}

// Four neighbours of one target pixel in an INT8 tensor of 16-channel blocks.
struct Corners {
    const s8 *a, *b, *c, *d;
    s32 right, down;

    IGATE_DEVICE Corners(const UpsampleParams& p, const Tap& row, const Tap& column)
        : a(p.x + (row.low * p.x_width + column.low) * p.x_pixel),
          b(p.x + (row.low * p.x_width + column.high) * p.x_pixel),
          c(p.x + (row.high * p.x_width + column.low) * p.x_pixel),
          d(p.x + (row.high * p.x_width + column.high) * p.x_pixel),
          right(column.share),
          down(row.share) {}

    IGATE_DEVICE s32 at(s32 channel) const {
        return between(load(a + channel), load(b + channel), load(c + channel), load(d + channel), right, down);
    }
};

// The class of the largest logit, the lowest one of equals: compared as whole numbers, never dequantised.
IGATE_DEVICE void argmax(const UpsampleParams& p) {
    const s32 index = static_cast<s32>(blockIdx.x * 128 + threadIdx.x);
    if (index >= p.height * p.width) return;
    const Tap row = load(p.rows + index / p.width), column = load(p.columns + index % p.width);
    const Corners corners(p, row, column);
    s32 best = -2147483647 - 1, found = 0;
    for (s32 block = 0; block * 16 < p.channels; ++block) {
        const s32 offset = block * 16 / p.x_pixel * p.x_plane + block * 16 % p.x_pixel;
        const Vec16 a = load(reinterpret_cast<const Vec16*>(corners.a + offset));
        const Vec16 b = load(reinterpret_cast<const Vec16*>(corners.b + offset));
        const Vec16 c = load(reinterpret_cast<const Vec16*>(corners.c + offset));
        const Vec16 d = load(reinterpret_cast<const Vec16*>(corners.d + offset));
#pragma unroll
        for (s32 i = 0; i < 16; ++i) {
            const s32 value = between(byte_of(a, i), byte_of(b, i), byte_of(c, i), byte_of(d, i), corners.right, corners.down);
            if (block * 16 + i < p.channels && value > best) {
                best = value;
                found = block * 16 + i;
            }
        }
    }
    store(static_cast<u8*>(p.y) + index, static_cast<u8>(found));
}

// exp(x) for |x| < 80 to 2 units in the last place: 2^n times a polynomial of the rest.
IGATE_DEVICE float exponential(float x) {
    const float n = __int2float_rn(__float2int_rn(__fmul_rn(x, 1.44269504f)));
    const float rest = __fmaf_rn(n, 1.42860677e-6f, __fmaf_rn(n, -0.693148612976f, x));
    float value = 1.98412698e-4f;
    value = __fmaf_rn(value, rest, 1.38888889e-3f);
    value = __fmaf_rn(value, rest, 8.33333333e-3f);
    value = __fmaf_rn(value, rest, 4.16666667e-2f);
    value = __fmaf_rn(value, rest, 1.66666667e-1f);
    value = __fmaf_rn(value, rest, 0.5f);
    value = __fmaf_rn(value, rest, 1.0f);
    value = __fmaf_rn(value, rest, 1.0f);
    return __fmul_rn(value, __int_as_float((__float2int_rn(n) + 127) << 23));
}

// Metres: exp of the natural logarithm that the network gives, within [low, high] of it.
IGATE_DEVICE void depth(const UpsampleParams& p) {
    const s32 index = static_cast<s32>(blockIdx.x * 128 + threadIdx.x);
    if (index >= p.height * p.width) return;
    const Corners corners(p, load(p.rows + index / p.width), load(p.columns + index % p.width));
    const float value = __fmul_rn(__int2float_rn(corners.at(0)), p.scale);
    store(static_cast<float*>(p.y) + index, exponential(fminf(fmaxf(value, p.low), p.high)));
}

// Unit vectors, zero where the network gives no direction; the scale of the tensor does not matter.
IGATE_DEVICE void normals(const UpsampleParams& p) {
    const s32 index = static_cast<s32>(blockIdx.x * 128 + threadIdx.x);
    if (index >= p.height * p.width) return;
    const Corners corners(p, load(p.rows + index / p.width), load(p.columns + index % p.width));
    float vector[3], squares = 0.0f;
#pragma unroll
    for (s32 c = 0; c < 3; ++c) {
        vector[c] = __fmul_rn(__int2float_rn(corners.at(c)), kTwice);
        squares = __fmaf_rn(vector[c], vector[c], squares);
    }
    const float length = fmaxf(__fsqrt_rn(squares), 1e-12f);
    float* const to = static_cast<float*>(p.y) + 3 * index;
#pragma unroll
    for (s32 c = 0; c < 3; ++c) store(to + c, __fdiv_rn(vector[c], length));
}

}  // namespace image

IGATE_KERNEL(preprocess_s8, PreprocessParams, 128, 8) {
    image::preprocess(p);
}
IGATE_KERNEL(argmax_upsample, UpsampleParams, 128, 8) {
    image::argmax(p);
}
IGATE_KERNEL(depth_upsample, UpsampleParams, 128, 8) {
    image::depth(p);
}
IGATE_KERNEL(normals_upsample, UpsampleParams, 128, 8) {
    image::normals(p);
}
