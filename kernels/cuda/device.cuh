// What the kernels need of a machine: plain types, asynchronous copies and the INT8 tensor core.
//
// No header of the system is included, so nvcc and NVRTC of any release take this text as it is. g++ takes it after
// emulator/emulator.hpp, which defines IGATE_EMULATOR and everything that stands below in inline assembly.
#pragma once

typedef signed char s8;
typedef unsigned char u8;
typedef short s16;
typedef unsigned short u16;
typedef int s32;
typedef unsigned int u32;

struct alignas(16) Vec16 {
    u32 word[4];
};
struct alignas(2) Pair {
    s8 first, second;
};
struct alignas(8) FloatPair {
    float first, second;
};

#ifndef IGATE_EMULATOR

#define IGATE_DEVICE __device__ __forceinline__
// A kernel takes one struct by value, so every launcher passes one blob of bytes. `blocks` an SM are asked for.
#define IGATE_KERNEL(name, Params, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Params p)
#define IGATE_SHARED(name) alignas(128) extern __shared__ s8 name[]

template <typename T>
IGATE_DEVICE T load(const T* from) {
    return *from;
}

template <typename T>
IGATE_DEVICE void store(T* to, const T& value) {
    *to = value;
}

IGATE_DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes, global to shared, past the L1 cache; zeros where `inside` is false (then nothing is read).
IGATE_DEVICE void cp_async16(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0));
}

IGATE_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `left` of this thread's committed groups are under way.
template <int left>
IGATE_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8x16-byte matrices; lane l names row l % 8 of matrix l / 8 and gets bytes 4 (l % 4).. of row l / 4 of each.
IGATE_DEVICE void ldmatrix_x4(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

// acc[16][8] += a[16][32] * b[32][8], signed bytes into INT32.
IGATE_DEVICE void mma_s8(s32 (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// The nearest whole number (ties to even) within [low, high]. Written with named operations: no compiler may fuse.
IGATE_DEVICE s32 rounded(float value, float low, float high) {
    return __float2int_rn(fminf(fmaxf(value, low), high));
}

IGATE_DEVICE s32 byte_of(const Vec16& bytes, s32 index) {
    return static_cast<s8>(bytes.word[index / 4] >> (index % 4 * 8));
}
