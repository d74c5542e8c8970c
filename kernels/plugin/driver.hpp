// A kernel on a device: its image loaded, its tables copied, by the CUDA driver that is loaded when first needed.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "spec.hpp"

namespace igate {

struct Module;  // an image in one context, shared by all layers that carry the same one

// A launch's function and tables in one CUDA context; freed with its last user.
class Resident {
public:
    // Throws std::runtime_error with the driver's own words.
    Resident(const Spec& spec, void* context);
    ~Resident();
    Resident(const Resident&) = delete;
    Resident& operator=(const Resident&) = delete;

    uint64_t tables() const { return address; }
    // Starts the kernel on a stream; `params` holds every argument. Returns "" or the driver's words.
    std::string launch(const Spec& spec, std::string& params, void* stream) const;

private:
    void* context;
    std::shared_ptr<Module> module;
    void* function = nullptr;
    uint64_t address = 0;
};

// The residents of one launch, one in each context; all clones of a plugin share this.
class Residents {
public:
    // In the calling thread's context; throws std::runtime_error.
    std::shared_ptr<const Resident> here(const Spec& spec);

private:
    std::mutex lock;
    std::map<void*, std::weak_ptr<const Resident>> known;
};

}  // namespace igate
