// The emulator's machine: fibres and their scheduler, memory, warp instructions, and a C interface for any launcher.
#include "emulator.hpp"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

const Kernel* Kernel::first = nullptr;

namespace {

constexpr unsigned kLanes = 32, kStack = 96 * 1024;
constexpr size_t kGuard = 256, kMostShared = 163 * 1024;  // what an sm_87 block may ask for
constexpr unsigned char kGuardByte = 0xC3, kPoison = 0x5A;

struct Copy {
    void* to;
    const void* from;  // null: zeros
};

enum class State { ready, at_barrier, in_warp, done };

struct Fibre {
    jmp_buf place;
    ucontext_t birth;
    std::vector<char> stack;
    bool born = false;
    State state = State::done;
    std::vector<Copy> copies;    // issued and not yet performed, oldest first
    std::vector<size_t> groups;  // of those, how many belong to each committed group
};

// A warp instruction waits for all its lanes; the last one carries it out.
struct Warp {
    unsigned arrived = 0;
    int op = 0;
    void* out[kLanes];
    const void* in[kLanes];
    unsigned b[kLanes][2];
};

struct Machine {
    jmp_buf scheduler;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    std::vector<signed char> memory;
    signed char* shared = nullptr;
    size_t shared_bytes = 0;
    std::map<const char*, std::pair<size_t, bool>> mapped;  // start -> (bytes, writable)
    const Kernel* kernel = nullptr;
    const void* params = nullptr;
    unsigned current = 0;
    bool reversed = false, greedy = false, eager = false;
    std::string error;
} machine;

[[noreturn]] void leave() { _longjmp(machine.scheduler, 1); }

[[noreturn]] void fail(const std::string& what) {
    machine.error = std::string(machine.kernel->name) + ", block " + std::to_string(blockIdx.x) + ", thread " +
                    std::to_string(threadIdx.x) + ": " + what;
    leave();
}

void yield() {
    if (_setjmp(machine.fibres[machine.current].place) == 0) leave();
}

// A fibre lives for all blocks of all launches: it runs a kernel, then waits to be made ready again.
void live() {
    for (;;) {
        machine.kernel->run(machine.params);
        machine.fibres[machine.current].state = State::done;
        yield();
    }
}

void resume(unsigned index) {
    Fibre& fibre = machine.fibres[index];
    machine.current = index;
    threadIdx = {index, 0, 0};
    if (_setjmp(machine.scheduler) != 0) return;
    if (fibre.born) _longjmp(fibre.place, 1);
    fibre.born = true;
    fibre.stack.resize(kStack);
    getcontext(&fibre.birth);
    fibre.birth.uc_stack.ss_sp = fibre.stack.data();
    fibre.birth.uc_stack.ss_size = fibre.stack.size();
    fibre.birth.uc_link = nullptr;
    makecontext(&fibre.birth, live, 0);
    setcontext(&fibre.birth);
}

void perform(const Copy& copy) {
    if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, 16);
    } else {
        std::memset(copy.to, 0, 16);
    }
}

void check_shared(const void* pointer) {
    const size_t offset = static_cast<size_t>(static_cast<const signed char*>(pointer) - machine.shared);
    if (offset % 16 != 0) fail("16 bytes of shared memory at misaligned offset " + std::to_string(offset));
    if (offset >= machine.shared_bytes || machine.shared_bytes - offset < 16) {
        fail("shared memory offset " + std::to_string(offset) + " of " + std::to_string(machine.shared_bytes));
    }
}

// Gathers the lanes of a warp for one instruction; true in the lane that arrives last and must carry it out.
bool gather(int op, void* out, const void* in, unsigned b0 = 0, unsigned b1 = 0) {
    Warp& warp = machine.warps[machine.current / kLanes];
    const unsigned lane = machine.current % kLanes;
    if (warp.arrived == 0) warp.op = op;
    if (warp.op != op) fail("lanes of one warp meet in different instructions");
    warp.out[lane] = out;
    warp.in[lane] = in;
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    if (++warp.arrived < kLanes) {
        machine.fibres[machine.current].state = State::in_warp;
        yield();
        return false;
    }
    return true;
}

void release_warp() {
    const unsigned first = machine.current / kLanes * kLanes;
    machine.warps[machine.current / kLanes].arrived = 0;
    for (unsigned i = first; i < first + kLanes; ++i) machine.fibres[i].state = State::ready;
}

// Where the m16n8k32 instruction keeps its operands: (lane, byte) -> column-major position, by the strides that CUTLASS
// publishes for it: A ((4,8),(4,2,2)) : ((64,1),(16,8,256)), B ((4,8),(4,2)) : ((32,1),(8,128)), C row ((4,8),(2,2)) :
// ((32,1),(16,8)).
struct Fragments {
    unsigned short a[kLanes][16], b[kLanes][8], c[kLanes][4];
    Fragments() {
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            const unsigned quad = lane % 4, group = lane / 4;
            for (unsigned v = 0; v < 16; ++v) {
                a[lane][v] = static_cast<unsigned short>(64 * quad + group + 16 * (v % 4) + 8 * (v / 4 % 2) + 256 * (v / 8));
            }
            for (unsigned v = 0; v < 8; ++v) b[lane][v] = static_cast<unsigned short>(32 * quad + group + 8 * (v % 4) + 128 * (v / 4));
            for (unsigned v = 0; v < 4; ++v) c[lane][v] = static_cast<unsigned short>(32 * quad + group + 16 * (v % 2) + 8 * (v / 2));
        }
    }
} const fragments;

void multiply_warp(const Warp& warp) {
    short a[16][32], b[8][32];
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        const signed char* bytes = static_cast<const signed char*>(warp.in[lane]);
        for (unsigned v = 0; v < 16; ++v) a[fragments.a[lane][v] % 16][fragments.a[lane][v] / 16] = bytes[v];
        const signed char* more = reinterpret_cast<const signed char*>(warp.b[lane]);
        for (unsigned v = 0; v < 8; ++v) b[fragments.b[lane][v] % 8][fragments.b[lane][v] / 8] = more[v];
    }
    int sums[16][8];
    for (unsigned m = 0; m < 16; ++m) {
        for (unsigned n = 0; n < 8; ++n) {
            int sum = 0;
            for (unsigned k = 0; k < 32; ++k) sum += a[m][k] * b[n][k];
            sums[m][n] = sum;
        }
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        unsigned* acc = static_cast<unsigned*>(warp.out[lane]);  // wraps, as the tensor core does
        for (unsigned v = 0; v < 4; ++v) acc[v] += static_cast<unsigned>(sums[fragments.c[lane][v] % 16][fragments.c[lane][v] / 16]);
    }
}

void matrices_warp(const Warp& warp) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            const char* row = static_cast<const char*>(warp.in[matrix * 8 + lane / 4]);
            std::memcpy(static_cast<char*>(warp.out[lane]) + 4 * matrix, row + 4 * (lane % 4), 4);
        }
    }
}

// One pass over the threads in the schedule's order. False when nobody could move.
bool pass() {
    const unsigned count = static_cast<unsigned>(machine.fibres.size()), warps = count / kLanes;
    bool moved = false;
    for (unsigned w = 0; w < warps; ++w) {
        const unsigned warp = machine.reversed ? warps - 1 - w : w;
        bool again = true;
        while (again) {
            again = false;
            for (unsigned l = 0; l < kLanes; ++l) {
                const unsigned index = warp * kLanes + (machine.reversed ? kLanes - 1 - l : l);
                if (machine.fibres[index].state != State::ready) continue;
                resume(index);
                if (!machine.error.empty()) return false;
                moved = again = true;
            }
            again = again && machine.greedy;
        }
    }
    return moved;
}

void run_block() {
    for (Fibre& fibre : machine.fibres) {
        fibre.state = State::ready;
        fibre.copies.clear();
        fibre.groups.clear();
    }
    for (Warp& warp : machine.warps) warp.arrived = 0;
    std::memset(machine.shared, kPoison, machine.shared_bytes);
    std::memset(machine.shared + machine.shared_bytes, kGuardByte, kGuard);
    for (;;) {
        const bool moved = pass();
        if (!machine.error.empty()) return;
        if (moved) continue;
        unsigned waiting = 0, done = 0;
        for (Fibre& fibre : machine.fibres) {
            waiting += fibre.state == State::at_barrier;
            done += fibre.state == State::done;
        }
        if (done == machine.fibres.size()) break;
        if (waiting + done != machine.fibres.size()) {
            machine.error = std::string(machine.kernel->name) + ": a warp instruction waits for lanes that never come";
            return;
        }
        for (Fibre& fibre : machine.fibres) {
            if (fibre.state == State::at_barrier) fibre.state = State::ready;
        }
    }
    for (size_t i = 0; i < kGuard; ++i) {
        if (static_cast<unsigned char>(machine.shared[machine.shared_bytes + i]) != kGuardByte) {
            machine.error = std::string(machine.kernel->name) + ": wrote beyond its shared memory";
            return;
        }
    }
}

int refuse(const std::string& why) {
    machine.error = why;
    return 1;
}

}  // namespace

signed char* shared_memory() { return machine.shared; }

void check_global(const void* pointer, size_t bytes, size_t alignment, bool write) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
        fail("misaligned address, " + std::to_string(bytes) + " bytes");
    }
    const char* const start = static_cast<const char*>(pointer);
    auto found = machine.mapped.upper_bound(start);
    if (found == machine.mapped.begin()) fail("illegal address");
    --found;
    const size_t offset = static_cast<size_t>(start - found->first);
    if (offset >= found->second.first || found->second.first - offset < bytes) {
        fail("illegal address: " + std::to_string(offset) + " bytes into a buffer of " +
             std::to_string(found->second.first));
    }
    if (write && !found->second.second) fail("a write to a read-only buffer");
}

void barrier() {
    machine.fibres[machine.current].state = State::at_barrier;
    yield();
}

void copy16(void* to, const void* from, bool inside) {
    check_shared(to);
    // The address of a copy that reads nothing may be anywhere, but hardware may still look at its alignment.
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("misaligned address of an asynchronous copy");
    if (inside) check_global(from, 16, 16, false);
    const Copy copy = {to, inside ? from : nullptr};
    if (machine.eager) {
        perform(copy);
    } else {
        machine.fibres[machine.current].copies.push_back(copy);
    }
}

void commit() {
    Fibre& fibre = machine.fibres[machine.current];
    size_t before = 0;
    for (const size_t size : fibre.groups) before += size;
    fibre.groups.push_back(fibre.copies.size() - before);
}

void wait(int left) {
    Fibre& fibre = machine.fibres[machine.current];
    while (fibre.groups.size() > static_cast<size_t>(left)) {
        const auto size = static_cast<std::ptrdiff_t>(fibre.groups.front());
        for (std::ptrdiff_t i = 0; i < size; ++i) perform(fibre.copies[static_cast<size_t>(i)]);
        fibre.copies.erase(fibre.copies.begin(), fibre.copies.begin() + size);
        fibre.groups.erase(fibre.groups.begin());
    }
}

void matrices(unsigned (&to)[4], const void* row) {
    check_shared(row);
    if (!gather(1, to, row)) return;
    matrices_warp(machine.warps[machine.current / kLanes]);
    release_warp();
}

void multiply(int (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if (!gather(2, acc, a, b0, b1)) return;
    multiply_warp(machine.warps[machine.current / kLanes]);
    release_warp();
}

}  // namespace emulator

extern "C" {

const char* igate_emulator_error() { return emulator::machine.error.c_str(); }

// Kernel number `index` of this build: its name, threads a block and bytes of parameters; 0 beyond the last.
int igate_emulator_kernel(unsigned index, const char** name, unsigned* threads, unsigned* params) {
    const emulator::Kernel* kernel = emulator::Kernel::first;
    for (; kernel != nullptr && index > 0; --index) kernel = kernel->next;
    if (kernel == nullptr) return 0;
    *name = kernel->name;
    *threads = kernel->threads;
    *params = kernel->params;
    return 1;
}

// Makes memory of this process known as device memory; kernels may touch nothing else.
void igate_emulator_map(const void* start, size_t bytes, int writable) {
    emulator::machine.mapped[static_cast<const char*>(start)] = {bytes, writable != 0};
}

void igate_emulator_unmap(const void* start) { emulator::machine.mapped.erase(static_cast<const char*>(start)); }

// order: 1 last thread first, 2 one warp as far as it can go, or both (3). eager: asynchronous copies land at once.
// Returns 0 when the grid ran to its end.
int igate_emulator_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared,
                          const void* params, unsigned bytes, int order, int eager) {
    using emulator::machine;
    machine.error.clear();
    const emulator::Kernel* kernel = emulator::Kernel::first;
    while (kernel != nullptr && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    if (kernel == nullptr) return emulator::refuse(std::string("no kernel ") + name);
    if (block[0] != kernel->threads || block[1] != 1 || block[2] != 1) {
        return emulator::refuse(std::string(name) + " needs a block of " + std::to_string(kernel->threads));
    }
    if (bytes != kernel->params) {
        return emulator::refuse(std::string(name) + " takes " + std::to_string(kernel->params) + " bytes, " +
                                std::to_string(bytes) + " given");
    }
    if (shared > emulator::kMostShared) return emulator::refuse(std::string(name) + ": more shared memory than sm_87 has");
    machine.kernel = kernel;
    machine.params = params;
    machine.reversed = (order & 1) != 0;
    machine.greedy = (order & 2) != 0;
    machine.eager = eager != 0;
    machine.fibres.resize(block[0]);
    machine.warps.resize(block[0] / emulator::kLanes);
    machine.memory.resize(shared + emulator::kGuard + 128);
    const auto base = reinterpret_cast<uintptr_t>(machine.memory.data());
    machine.shared = machine.memory.data() + (128 - base % 128) % 128;
    machine.shared_bytes = shared;
    blockDim = {block[0], block[1], block[2]};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; ++z) {
        for (unsigned y = 0; y < grid[1]; ++y) {
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                emulator::run_block();
                if (machine.error.empty()) continue;
                machine.fibres.clear();  // they stand amid a kernel
                return 1;
            }
        }
    }
    return 0;
}
}
