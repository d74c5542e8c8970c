// igate::Kernel, a TensorRT plugin (IPluginV3) that launches one kernel image; see spec.hpp for what a node says.
//
// Host code only: no nvcc, no link with TensorRT or CUDA. TensorRT's calls may not throw, so each catches what its own
// work throws and answers with an error and a line in TensorRT's log.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "spec.hpp"

namespace igate {

using namespace nvinfer1;

namespace {

constexpr char kName[] = "Kernel", kVersion[] = "1", kNamespace[] = "igate";
constexpr uint64_t kAlignment = 16;  // of every tensor that a kernel reads in vectors

ILoggerFinder* finder = nullptr;

void complain(const std::string& why) noexcept {
    ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    try {
        const std::string line = "igate::Kernel: " + why;
        if (logger != nullptr) {
            logger->log(ILogger::Severity::kERROR, line.c_str());
        } else {
            std::fprintf(stderr, "%s\n", line.c_str());
        }
    } catch (const std::exception&) {
        std::fputs("igate::Kernel: out of memory\n", stderr);
    }
}

class Kernel final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    Kernel(std::shared_ptr<const Spec> what, std::shared_ptr<Residents> where)
        : spec(std::move(what)), residents(std::move(where)), params(spec->params) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override {
        try {
            return new Kernel(spec, residents);
        } catch (const std::exception& error) {
            complain(error.what());
            return nullptr;
        }
    }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const* given,
                               int32_t inputs) const noexcept override {
        if (outputs != 1 || !counted(inputs)) return 1;
        for (int32_t i = 0; i < inputs; ++i) {
            if (given[i] != tensor(i).type) return wrong("an input has another type than the kernel reads");
        }
        types[0] = spec->tensors.back().type;
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* given, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* shapes,
                            int32_t outputs, IExprBuilder& builder) noexcept override {
        if (outputs != 1 || !counted(inputs)) return 1;
        for (int32_t i = 0; i < inputs; ++i) {
            const auto rank = static_cast<int32_t>(spec->inputs[static_cast<size_t>(i)].size());
            if (given[i].nbDims != rank) return wrong("an input has another rank than the launch was made for");
        }
        shapes[0].nbDims = static_cast<int32_t>(spec->output.size());
        for (size_t i = 0; i < spec->output.size(); ++i) {
            shapes[0].d[i] = side(spec->output[i], given, builder);
            if (shapes[0].d[i] == nullptr) return wrong("no shape expression");
        }
        return 0;
    }

    bool supportsFormatCombination(int32_t place, DynamicPluginTensorDesc const* all, int32_t inputs,
                                   int32_t outputs) noexcept override {
        if (outputs != 1 || !counted(inputs) || place < 0 || place > inputs) return false;
        return all[place].desc.type == tensor(place).type && all[place].desc.format == tensor(place).format;
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                            int32_t outputs) noexcept override {
        if (outputs != 1 || !counted(inputs)) return 1;
        for (int32_t i = 0; i < inputs; ++i) {
            for (const Dims& sides : {in[i].min, in[i].max}) {
                if (misfits(sides, i)) return 1;
            }
        }
        return 0;
    }

    char const* getTimingCacheID() noexcept override { return spec->digest().c_str(); }
    char const* getMetadataString() noexcept override { return spec->kernel.c_str(); }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                          int32_t outputs) noexcept override {
        if (outputs != 1 || !counted(inputs)) return 1;
        for (int32_t i = 0; i < inputs; ++i) {
            if (misfits(in[i].dims, i)) return 1;
        }
        return ready() ? 0 : 1;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        // Here rather than in enqueue: nothing may be allocated while a CUDA graph is captured.
        IPluginV3* const copy = clone();
        if (copy == nullptr || static_cast<Kernel*>(copy)->ready()) return copy;
        delete copy;
        return nullptr;
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        const auto count = static_cast<int32_t>(spec->inputs.size());
        for (int32_t i = 0; i < count; ++i) {
            if (misfits(in[i].dims, i)) return 1;
        }
        if (!ready()) return 1;
        for (const Pointer& one : spec->pointers) {
            const bool table = one.source == kTables;
            const void* const tensor = table ? nullptr : one.source == count ? outputs[0] : inputs[one.source];
            const uint64_t start = table ? resident->tables() : reinterpret_cast<uint64_t>(tensor);
            if (start == 0 || start % kAlignment != 0) return wrong("a tensor has no aligned address");
            const uint64_t address = start + static_cast<uint64_t>(one.offset);
            std::memcpy(&params[static_cast<size_t>(one.at)], &address, sizeof address);
        }
        try {
            const std::string why = resident->launch(*spec, params, stream);
            return why.empty() ? 0 : wrong(why);
        } catch (const std::exception& error) {
            return wrong(error.what());
        }
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &spec->serialised(); }

private:
    static int32_t wrong(const std::string& why) noexcept {
        complain(why);
        return 1;
    }

    const Tensor& tensor(int32_t index) const { return spec->tensors[static_cast<size_t>(index)]; }

    bool counted(int32_t inputs) const noexcept {
        const bool same = inputs >= 0 && static_cast<size_t>(inputs) == spec->inputs.size();
        if (!same) complain("the node has another number of inputs than the launch was made for");
        return same;
    }

    bool misfits(const Dims& sides, int32_t input) const noexcept {
        try {
            const std::string why = spec->mismatch(sides, static_cast<size_t>(input));
            if (!why.empty()) complain(why);
            return !why.empty();
        } catch (const std::exception& error) {
            complain(error.what());
            return true;
        }
    }

    bool ready() noexcept {
        try {
            if (resident == nullptr) resident = residents->here(*spec);
            return true;
        } catch (const std::exception& error) {
            complain(error.what());
            return false;
        }
    }

    static const IDimensionExpr* side(const Side& rule, DimsExprs const* inputs, IExprBuilder& builder) noexcept {
        if (rule.input == kConstant) return builder.constant(rule.value);
        const IDimensionExpr* const from = inputs[rule.input].d[rule.value];
        const IDimensionExpr* const add = builder.constant(rule.add);
        const IDimensionExpr* const divide = builder.constant(rule.divide);
        if (from == nullptr || add == nullptr || divide == nullptr) return nullptr;
        const IDimensionExpr* const sum = builder.operation(DimensionOperation::kSUM, *from, *add);
        return sum == nullptr ? nullptr : builder.operation(DimensionOperation::kFLOOR_DIV, *sum, *divide);
    }

    std::shared_ptr<const Spec> spec;
    std::shared_ptr<Residents> residents;
    std::shared_ptr<const Resident> resident;
    std::string params;  // this clone's own: two contexts may launch at the same time
};

class Creator final : public IPluginCreatorV3One {
public:
    Creator() {
        for (const Field& form : fields()) forms.emplace_back(form.name.c_str(), nullptr, form.type, 0);
        collection.nbFields = static_cast<int32_t>(forms.size());
        collection.fields = forms.data();
    }

    IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* given,
                            TensorRTPhase) noexcept override {
        try {
            if (given == nullptr) throw std::invalid_argument("there are no fields");
            return new Kernel(std::make_shared<const Spec>(*given), std::make_shared<Residents>());
        } catch (const std::exception& error) {
            complain(std::string(name != nullptr ? name : "?") + ": " + error.what());
            return nullptr;
        }
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &collection; }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    std::vector<PluginField> forms;
    PluginFieldCollection collection{};
};

}  // namespace

}  // namespace igate

// What TensorRT looks for in a plugin library.
#define IGATE_EXPORT extern "C" __attribute__((visibility("default")))

IGATE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static igate::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const all[] = {&creator};
    count = 1;
    return all;
}

IGATE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* found) { igate::finder = found; }
