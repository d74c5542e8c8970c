#include "driver.hpp"

#include <dlfcn.h>

#include <list>
#include <stdexcept>
#include <vector>

namespace igate {

namespace {

constexpr int kDynamicShared = 8;          // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int32_t kFreeShared = 48 * 1024;  // more has to be asked for

// The calls of libcuda.so.1 that a launch needs, declared here so that no cuda.h is.
struct Driver {
    int (*init)(unsigned);
    int (*error_name)(int, const char**);
    int (*error_text)(int, const char**);
    int (*current)(void**);
    int (*push)(void*);
    int (*pop)(void**);
    int (*load)(void**, const void*);
    int (*unload)(void*);
    int (*find)(void**, void*, const char*);
    int (*set)(void*, int, int);
    int (*allocate)(uint64_t*, size_t);
    int (*release)(uint64_t);
    int (*upload)(uint64_t, const void*, size_t);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
};

template <typename T>
void bind(void* library, const char* name, T& call) {
    void* const found = dlsym(library, name);
    if (found == nullptr) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
    call = reinterpret_cast<T>(found);
}

Driver opened() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
    Driver driver{};
    bind(library, "cuInit", driver.init);
    bind(library, "cuGetErrorName", driver.error_name);
    bind(library, "cuGetErrorString", driver.error_text);
    bind(library, "cuCtxGetCurrent", driver.current);
    bind(library, "cuCtxPushCurrent_v2", driver.push);
    bind(library, "cuCtxPopCurrent_v2", driver.pop);
    bind(library, "cuModuleLoadData", driver.load);
    bind(library, "cuModuleUnload", driver.unload);
    bind(library, "cuModuleGetFunction", driver.find);
    bind(library, "cuFuncSetAttribute", driver.set);
    bind(library, "cuMemAlloc_v2", driver.allocate);
    bind(library, "cuMemFree_v2", driver.release);
    bind(library, "cuMemcpyHtoD_v2", driver.upload);
    bind(library, "cuLaunchKernel", driver.launch);
    return driver;
}

// Throws where there is no driver, and tries again at the next call.
const Driver& driver() {
    static const Driver calls = opened();
    return calls;
}

std::string words(int code, const char* doing) {
    const char *name = nullptr, *text = nullptr;
    driver().error_name(code, &name);
    driver().error_text(code, &text);
    const std::string known = name != nullptr ? name : "?", told = text != nullptr ? text : "?";
    return std::string("cannot ") + doing + ": " + known + " (" + std::to_string(code) + "), " + told;
}

void check(int code, const char* doing) {
    if (code != 0) throw std::runtime_error(words(code, doing));
}

// A context made current for a while; freeing may happen in any thread.
class Within {
public:
    explicit Within(void* context) : pushed(driver().push(context) == 0) {}
    ~Within() {
        void* left = nullptr;
        if (pushed) driver().pop(&left);
    }
    Within(const Within&) = delete;
    Within& operator=(const Within&) = delete;

private:
    bool pushed;
};

}  // namespace

struct Module {
    Module(const std::string& bytes, void* in) : image(bytes), context(in) {
        check(driver().load(&handle, image.c_str()), "load the kernel's image");
    }
    ~Module() {
        const Within inside(context);
        driver().unload(handle);
    }
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    const std::string image;
    void* const context;
    void* handle = nullptr;
};

namespace {

std::shared_ptr<Module> loaded(const std::string& image, void* context) {
    static std::mutex lock;
    static std::list<std::weak_ptr<Module>> known;
    const std::lock_guard<std::mutex> held(lock);
    known.remove_if([](const std::weak_ptr<Module>& one) { return one.expired(); });
    for (const auto& one : known) {
        const std::shared_ptr<Module> module = one.lock();
        if (module != nullptr && module->context == context && module->image == image) return module;
    }
    const auto module = std::make_shared<Module>(image, context);
    known.push_back(module);
    return module;
}

}  // namespace

Resident::Resident(const Spec& spec, void* in) : context(in), module(loaded(spec.image, in)) {
    check(driver().find(&function, module->handle, spec.kernel.c_str()), ("find kernel " + spec.kernel).c_str());
    if (spec.shared > kFreeShared) check(driver().set(function, kDynamicShared, spec.shared), "reserve shared memory");
    if (spec.tables.empty()) return;
    check(driver().allocate(&address, spec.tables.size()), "allocate the kernel's tables");
    const int code = driver().upload(address, spec.tables.data(), spec.tables.size());
    if (code == 0) return;
    driver().release(address);
    check(code, "copy the kernel's tables");
}

Resident::~Resident() {
    const Within inside(context);
    if (address != 0) driver().release(address);
}

std::string Resident::launch(const Spec& spec, std::string& params, void* stream) const {
    std::vector<void*> arguments;
    for (const int32_t start : spec.arguments) arguments.push_back(&params[static_cast<size_t>(start)]);
    const auto side = [](int32_t value) { return static_cast<unsigned>(value); };
    const auto &grid = spec.grid, &block = spec.block;
    const int code = driver().launch(function, side(grid[0]), side(grid[1]), side(grid[2]), side(block[0]),
                                     side(block[1]), side(block[2]), side(spec.shared), stream, arguments.data(),
                                     nullptr);
    return code == 0 ? "" : words(code, "launch the kernel");
}

std::shared_ptr<const Resident> Residents::here(const Spec& spec) {
    check(driver().init(0), "start the driver");
    void* context = nullptr;
    check(driver().current(&context), "ask for the context");
    if (context == nullptr) throw std::runtime_error("no CUDA context is current in this thread");
    const std::lock_guard<std::mutex> held(lock);
    std::shared_ptr<const Resident> resident = known[context].lock();
    if (resident == nullptr) known[context] = resident = std::make_shared<const Resident>(spec, context);
    return resident;
}

}  // namespace igate
