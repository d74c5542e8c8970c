// A CUDA block on one CPU core: the kernels' own source, one fibre a thread, barriers as yields.
//
// What a compiler of CUDA would supply is supplied here: thread indices, shared memory, barriers, asynchronous copies,
// ldmatrix, mma. Wherever hardware leaves freedom, the schedule takes it: warps advance in step forward or backward,
// or one warp runs as far as it can; copies land when they are issued, or not before a wait asks for them. Every
// access to global memory and every 16-byte access to shared memory is checked for bounds and alignment.
// Not modelled: bank conflicts, coalescing, occupancy, weak memory order.
#pragma once
#define IGATE_EMULATOR

#include <cstddef>
#include <cstdint>

#define IGATE_DEVICE inline __attribute__((always_inline))

struct EmulatedIndex {
    unsigned x, y, z;
};
extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Kernel {
    const char* name;
    unsigned threads, params;
    void (*run)(const void*);
    const Kernel* next;
    static const Kernel* first;

    Kernel(const char* name_, unsigned threads_, unsigned params_, void (*run_)(const void*))
        : name(name_), threads(threads_), params(params_), run(run_), next(first) {
        first = this;
    }
};

signed char* shared_memory();
void check_global(const void* pointer, size_t bytes, size_t alignment, bool write);
void barrier();
void copy16(void* to, const void* from, bool inside);
void commit();
void wait(int left);
void matrices(unsigned (&to)[4], const void* row);
void multiply(int (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

}  // namespace emulator

#define IGATE_KERNEL(name, Params, threads, blocks)                                                    \
    static void name(const Params& p);                                                                 \
    static const emulator::Kernel name##_entry(#name, threads, sizeof(Params), [](const void* params) { \
        name(*static_cast<const Params*>(params));                                                     \
    });                                                                                                \
    static void name(const Params& p)
#define IGATE_SHARED(name) signed char* const name = emulator::shared_memory()

template <typename T>
inline T load(const T* from) {
    emulator::check_global(from, sizeof(T), alignof(T), false);
    return *from;
}

template <typename T>
inline void store(T* to, const T& value) {
    emulator::check_global(to, sizeof(T), alignof(T), true);
    *to = value;
}

inline void __syncthreads() { emulator::barrier(); }
inline void cp_async16(void* to, const void* from, bool inside) { emulator::copy16(to, from, inside); }
inline void cp_async_commit() { emulator::commit(); }
template <int left>
inline void cp_async_wait() {
    emulator::wait(left);
}
inline void ldmatrix_x4(unsigned (&to)[4], const void* row) { emulator::matrices(to, row); }
inline void mma_s8(int (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulator::multiply(acc, a, b0, b1);
}

// Built with -ffp-contract=off: each of these rounds once, as its namesake does.
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(__builtin_rintf(a)); }
inline float __int_as_float(int a) {
    float value;
    __builtin_memcpy(&value, &a, sizeof value);
    return value;
}
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
