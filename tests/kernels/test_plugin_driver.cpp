// A libcuda.so.1 that runs nothing and says what a launch hands it: for kernels of several arguments, of which the
// emulated driver has none. SIZES: bytes of each argument, as the kernel itself would know them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#ifndef SIZES
#error "define SIZES"
#endif

extern "C" {
int cuInit(unsigned) { return 0; }
int cuGetErrorName(int, const char** name) { return *name = "NAME", 0; }
int cuGetErrorString(int, const char** text) { return *text = "text", 0; }
int cuCtxGetCurrent(void** context) { return *context = reinterpret_cast<void*>(16), 0; }
int cuCtxCreate_v2(void** context, unsigned, int) { return cuCtxGetCurrent(context); }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuModuleLoadData(void** module, const void* image) {
    std::printf("load %.4s\n", static_cast<const char*>(image) + 1);
    return *module = reinterpret_cast<void*>(32), 0;
}
int cuModuleUnload(void*) { return std::printf("unload\n"), 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    std::printf("find %s\n", name);
    return *function = reinterpret_cast<void*>(48), 0;
}
int cuFuncSetAttribute(void*, int which, int value) { return std::printf("set %d %d\n", which, value), 0; }
int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
    *address = reinterpret_cast<unsigned long long>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    return 0;
}
int cuMemFree_v2(unsigned long long address) { return std::free(reinterpret_cast<void*>(address)), 0; }
int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes) {
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), 0;
}
int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t bytes) {
    return std::memcpy(to, reinterpret_cast<void*>(from), bytes), 0;
}
int cuStreamCreate(void** stream, unsigned) { return *stream = reinterpret_cast<void*>(64), 0; }
int cuStreamDestroy_v2(void*) { return 0; }
int cuStreamSynchronize(void*) { return 0; }
int cuLaunchKernel(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** params, void** extra) {
    std::printf("launch %u %u %u %u %u %u %u stream %d extra %d", gx, gy, gz, bx, by, bz, shared,
                stream == reinterpret_cast<void*>(64), extra != nullptr);
    for (const unsigned size : {SIZES}) {
        unsigned long long value = 0;
        std::memcpy(&value, *params++, size);
        // Of an address the first byte behind it, which the test has put there.
        if (size == 8) value = value == 0 ? 0 : *reinterpret_cast<const unsigned char*>(value);
        std::printf(" %llu", value);
    }
    std::printf("\n");
    return 0;
}
}
