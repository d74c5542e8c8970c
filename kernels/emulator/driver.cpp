// A CUDA driver of one emulated Orin: the part of libcuda.so.1 that launchers call, on top of emulator.cpp.
//
// Loading a module checks what a real driver checks (ELF, architecture, ABI, ISA of PTX); the code in it is not run.
// Instead the digest of its source must be that of the kernels beside this driver, and those are run. As on hardware, a
// kernel's error shows in the next call that waits, and stays until the context is gone.
#include "driver.hpp"

#include <dlfcn.h>
#include <time.h>

#include "unsupported.hpp"

#define GUARDED(condition, error)                          \
    const std::lock_guard<std::recursive_mutex> held(lock); \
    if (const Result state = ready()) return state;         \
    if (!(condition)) return error

extern "C" {

Result cuInit(unsigned flags) {
    if (flags != 0) return invalid_value;
    initialized = true;
    return success;
}

Result cuDriverGetVersion(int* version) {
    *version = IGATE_DRIVER;
    return success;
}

// NVRTC 13 looks for the driver's own tables, wherever a libcuda.so.1 is loaded; there are none.
Result cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return not_found;
}

Result cuGetErrorName(int code, const char** name) {
    for (const Named& one : kNames) {
        if (one.code != code) continue;
        *name = one.name;
        return success;
    }
    *name = nullptr;
    return invalid_value;
}

Result cuGetErrorString(int code, const char** text) {
    for (const Named& one : kNames) {
        if (one.code != code) continue;
        const bool detailed = code == sticky && code != success;
        static std::string held;
        held = detailed ? std::string(one.text) + " (" + igate_emulator_error() + ")" : one.text;
        *text = held.c_str();
        return success;
    }
    *text = nullptr;
    return invalid_value;
}

// What newer bindings ask for in place of linking.
Result cuGetProcAddress_v2(const char* name, void** place, int, uint64_t, int* status) {
    static void* const self = dlopen(nullptr, RTLD_LAZY);
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&cuInit), &info);
    static void* const here = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    *place = nullptr;
    for (const char* version : {"_v4", "_v3", "_v2", ""}) {
        if (*place == nullptr) *place = dlsym(here != nullptr ? here : self, (std::string(name) + version).c_str());
    }
    if (status != nullptr) *status = *place == nullptr ? 1 : 0;
    return *place == nullptr ? not_found : success;
}

Result cuDeviceGetCount(int* count) {
    *count = 1;
    return initialized ? success : not_initialized;
}
Result cuDeviceGet(int* device, int ordinal) {
    if (!initialized) return not_initialized;
    *device = 0;
    return ordinal == 0 ? success : invalid_device;
}
Result cuDeviceGetName(char* name, int size, int device) {
    std::snprintf(name, static_cast<size_t>(size), "Orin (emulated)");
    return device == 0 ? success : invalid_device;
}
Result cuDeviceGetAttribute(int* value, int which, int device) {
    *value = attribute(which);
    return device == 0 ? success : invalid_device;
}
Result cuDeviceComputeCapability(int* major, int* minor, int device) {
    *major = kArch / 10, *minor = kArch % 10;
    return device == 0 ? success : invalid_device;
}
Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
    *bytes = kMemory;
    return device == 0 ? success : invalid_device;
}
Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    *free = *total = kMemory;
    return ready();
}

Result cuCtxPushCurrent_v2(Context* context) {
    if (!initialized) return not_initialized;
    if (context == nullptr || depth == 8) return invalid_context;
    current[depth++] = context;
    return success;
}
Result cuCtxPopCurrent_v2(Context** context) {
    if (depth == 0) return invalid_context;
    --depth;
    if (context != nullptr) *context = current[depth];
    return success;
}
Result cuCtxSetCurrent(Context* context) {
    if (!initialized) return not_initialized;
    if (depth > 0) --depth;
    return context == nullptr ? success : cuCtxPushCurrent_v2(context);
}
Result cuCtxGetCurrent(Context** context) {
    *context = depth == 0 ? nullptr : current[depth - 1];
    return initialized ? success : not_initialized;
}
Result cuCtxGetDevice(int* device) {
    *device = 0;
    return ready();
}
Result cuCtxGetApiVersion(Context*, unsigned* version) {
    *version = 3020;
    return success;
}
Result cuDevicePrimaryCtxRetain(Context** context, int device) {
    if (!initialized) return not_initialized;
    if (device != 0) return invalid_device;
    ++primary.users;
    *context = &primary;
    return success;
}
// The last user's leaving destroys the context, with all that was allocated and the error that it was left in.
Result cuDevicePrimaryCtxRelease_v2(int) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (primary.users == 0) return invalid_context;
    if (--primary.users > 0) return success;
    for (const auto& [start, size] : memory) {
        igate_emulator_unmap(reinterpret_cast<void*>(start));
        std::free(reinterpret_cast<void*>(start));
    }
    memory.clear();
    for (const auto& one : modules) delete one.first;
    modules.clear();
    sticky = success;
    return success;
}
Result cuCtxCreate_v2(Context** context, unsigned, int device) {
    const Result result = cuDevicePrimaryCtxRetain(context, device);
    return result != success ? result : cuCtxPushCurrent_v2(*context);
}
Result cuCtxCreate_v4(Context** context, void*, unsigned flags, int device) {
    return cuCtxCreate_v2(context, flags, device);
}
Result cuCtxDestroy_v2(Context*) {
    if (depth > 0) --depth;
    return cuDevicePrimaryCtxRelease_v2(0);
}
Result cuCtxSynchronize() { return ready(); }

Result cuModuleLoadData(Module** module, const void* image) {
    GUARDED(image != nullptr, invalid_value);
    std::string code;
    if (const Result refused = accept(static_cast<const char*>(image), code)) return refused;
    *module = new Module{code};
    modules[*module];
    return success;
}
Result cuModuleLoadDataEx(Module** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
Result cuModuleUnload(Module* module) {
    GUARDED(modules.erase(module) == 1, invalid_handle);
    delete module;
    return success;
}
Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
    GUARDED(modules.count(module) == 1, invalid_handle);
    const bool entry = module->code.find(".text." + std::string(name) + '\0') != std::string::npos ||
                       module->code.find(".entry " + std::string(name) + "(") != std::string::npos;
    const char* listed;
    unsigned threads, params;
    for (unsigned i = 0; entry && igate_emulator_kernel(i, &listed, &threads, &params) != 0; ++i) {
        if (std::strcmp(listed, name) != 0) continue;
        *function = &modules[module].emplace(name, Function{name, threads, params}).first->second;
        return success;
    }
    return not_found;
}
Result cuFuncSetAttribute(Function* function, int which, int value) {
    if (which != 8) return success;  // 8: dynamic shared memory
    if (value < 0 || static_cast<unsigned>(value) > kMostShared) return invalid_value;
    function->shared = static_cast<unsigned>(value) < kFreeShared ? kFreeShared : static_cast<unsigned>(value);
    return success;
}
Result cuFuncSetBlockShape(Function* function, int x, int y, int z) {  // before CUDA 4; pycuda still calls it
    return function != nullptr && x > 0 && y > 0 && z > 0 ? success : invalid_value;
}
Result cuFuncGetAttribute(int* value, int which, Function* function) {
    *value = which == 0 ? static_cast<int>(function->threads) : which == 5 || which == 6 ? static_cast<int>(kArch) : 0;
    return success;
}

// The same by the names of CUDA 12: a library is a module, a kernel its function.
Result cuLibraryLoadData(Module** library, const void* image, int*, void**, unsigned, int*, void**, unsigned) {
    return cuModuleLoadData(library, image);
}
Result cuLibraryUnload(Module* library) { return cuModuleUnload(library); }
Result cuLibraryGetKernel(Function** kernel, Module* library, const char* name) {
    return cuModuleGetFunction(kernel, library, name);
}
Result cuKernelGetFunction(Function** function, Function* kernel) {
    *function = kernel;
    return success;
}
Result cuKernelGetAttribute(int* value, int which, Function* kernel, int) {
    return cuFuncGetAttribute(value, which, kernel);
}

Result cuMemAlloc_v2(Address* address, size_t bytes) {
    GUARDED(bytes > 0, invalid_value);
    if (bytes > kMemory) return out_of_memory;
    void* const start = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (start == nullptr) return out_of_memory;
    std::memset(start, 0xA5, bytes);  // nobody may rely on zeros
    igate_emulator_map(start, bytes, 1);
    *address = reinterpret_cast<Address>(start);
    memory[*address] = bytes;
    return success;
}
Result cuMemFree_v2(Address address) {
    GUARDED(memory.erase(address) == 1, invalid_value);
    igate_emulator_unmap(reinterpret_cast<void*>(address));
    std::free(reinterpret_cast<void*>(address));
    return success;
}
Result cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) {
    GUARDED(allocated(to, bytes), invalid_value);
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return success;
}
Result cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) {
    GUARDED(allocated(from, bytes), invalid_value);
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    return success;
}
Result cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) {
    GUARDED(allocated(to, bytes) && allocated(from, bytes), invalid_value);
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    return success;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream*) {
    return cuMemcpyHtoD_v2(to, from, bytes);
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream*) { return cuMemcpyDtoH_v2(to, from, bytes); }
Result cuMemsetD8_v2(Address to, unsigned char value, size_t bytes) {
    GUARDED(allocated(to, bytes), invalid_value);
    std::memset(reinterpret_cast<void*>(to), value, bytes);
    return success;
}

Result cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, Stream*, void** params, void** extra) {
    GUARDED(function != nullptr, invalid_handle);
    if (gx * gy * gz == 0 || bx * by * bz == 0 || bx > 1024 || shared > function->shared) return invalid_value;
    const void* packed = params != nullptr ? params[0] : nullptr;
    for (; extra != nullptr && *extra != nullptr; extra += 2) {  // (1, buffer, 2, size, 0)
        if (*extra == reinterpret_cast<void*>(1)) packed = extra[1];
        if (*extra == reinterpret_cast<void*>(2) && *static_cast<size_t*>(extra[1]) != function->params) return invalid_value;
    }
    if (packed == nullptr) return invalid_value;
    const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    if (igate_emulator_launch(function->name.c_str(), grid, block, shared, packed, function->params, 0, 0) != 0) {
        const bool address = std::strstr(igate_emulator_error(), "address") != nullptr;
        sticky = address ? illegal_address : launch_failed;
    }
    return success;
}

Result cuStreamCreate(Stream** stream, unsigned) {
    GUARDED(stream != nullptr, invalid_value);
    *stream = new Stream;
    return success;
}
Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return ready();
}
Result cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
Result cuStreamSynchronize(Stream*) { return ready(); }
Result cuStreamDestroy_v2(Stream* stream) {
    delete stream;
    return success;
}

Result cuEventCreate(Event** event, unsigned) {
    GUARDED(event != nullptr, invalid_value);
    *event = new Event;
    return success;
}
Result cuEventRecord(Event* event, Stream*) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->ms = static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) / 1e6;
    return ready();
}
Result cuEventSynchronize(Event*) { return ready(); }
Result cuEventQuery(Event*) { return ready(); }
Result cuEventElapsedTime(float* ms, const Event* start, const Event* end) {
    *ms = static_cast<float>(end->ms - start->ms);
    return ready();
}
Result cuEventDestroy_v2(Event* event) {
    delete event;
    return success;
}
Result cuEventElapsedTime_v2(float* ms, const Event* start, const Event* end) {
    return cuEventElapsedTime(ms, start, end);
}

#define UNSUPPORTED(name) \
    Result name() { return not_supported; }
IGATE_UNSUPPORTED(UNSUPPORTED)
}
