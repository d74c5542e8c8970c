// What TensorRT does with a plugin library, by hand: create, ask, serialise, clone, launch. Prints one fact a line.
//
//   host LIBRARY FIELDS describe|enqueue Y INPUT.. [-- what goes wrong]
//
// FIELDS: per field the length of its name, the name, 0 for text or 1 for numbers, a count, the bytes. Y: read before
// and written after the launch.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Log : ILogger {
    void log(Severity severity, AsciiChar const* text) noexcept override {
        std::cout << "log " << static_cast<int>(severity) << ' ' << text << '\n';
    }
};
struct Finder : ILoggerFinder {
    ILogger* findLogger() override { return &log; }
    Log log;
};

// Sides of tensors as TensorRT gives them: an expression that can only be combined or asked.
struct Side : IDimensionExpr, apiv::VDimensionExpr {
    explicit Side(int64_t number) : value(number) { mImpl = this; }
    ~Side() noexcept override = default;
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
    int64_t value;
};
struct Builder : IExprBuilder, apiv::VExprBuilder {
    Builder() { mImpl = this; }
    IDimensionExpr const* constant(int64_t value) override { return &made.emplace_back(value); }
    IDimensionExpr const* operation(DimensionOperation what, IDimensionExpr const& a,
                                    IDimensionExpr const& b) override {
        const int64_t x = a.getConstantValue(), y = b.getConstantValue();
        if (what == DimensionOperation::kSUM) return &made.emplace_back(x + y);
        if (what != DimensionOperation::kFLOOR_DIV || y == 0) return nullptr;
        return &made.emplace_back(x / y - (x % y != 0 && (x < 0) != (y < 0) ? 1 : 0));
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
    std::deque<Side> made;
};

std::vector<char> contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) std::exit((std::cout << "cannot read " << path << '\n', 2));
    return {std::istreambuf_iterator<char>(file), {}};
}

struct Fields {
    explicit Fields(const std::string& path) : bytes(contents(path)) {
        for (size_t at = 0; at < bytes.size();) {
            const std::string name(text(at));
            const bool numbers = word(at) != 0;
            const uint32_t count = word(at), size = numbers ? 4 * count : count;
            names.push_back(name);
            // Its own memory, exactly as long as it says: whatever is read beyond it is found out.
            data.emplace_back(bytes.begin() + static_cast<long>(at), bytes.begin() + static_cast<long>(at + size));
            at += size;
            all.emplace_back(nullptr, data.back().data(), numbers ? PluginFieldType::kINT32 : PluginFieldType::kCHAR,
                             static_cast<int32_t>(count));
        }
        for (size_t i = 0; i < all.size(); ++i) all[i].name = names[i].c_str();
        collection.nbFields = static_cast<int32_t>(all.size());
        collection.fields = all.data();
    }
    uint32_t word(size_t& at) const {
        uint32_t value;
        std::memcpy(&value, &bytes[at], 4);
        at += 4;
        return value;
    }
    std::string text(size_t& at) const {
        const uint32_t size = word(at);
        at += size;
        return {&bytes[at - size], size};
    }
    const std::vector<char> bytes;
    std::vector<std::string> names;
    std::deque<std::vector<char>> data;
    std::vector<PluginField> all;
    PluginFieldCollection collection{};
};

template <typename T>
T* ability(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<T*>(plugin->getCapabilityInterface(type));
}

std::string kind(IVersionedInterface* one) {
    const InterfaceInfo info = one->getInterfaceInfo();
    return std::string(info.kind) + ' ' + std::to_string(info.major);
}

const PluginField* find(const PluginFieldCollection& all, const char* name) {
    for (int32_t i = 0; i < all.nbFields; ++i) {
        if (std::strcmp(all.fields[i].name, name) == 0) return all.fields + i;
    }
    std::exit((std::cout << "no field " << name << '\n', 2));
}

// Shapes of the inputs that the launch was made for.
std::vector<Dims> shapes(const PluginFieldCollection& all) {
    const PluginField* const field = find(all, "inputs");
    const auto* const numbers = static_cast<const int32_t*>(field->data);
    std::vector<Dims> found;
    for (int32_t i = 0; i < field->length; i += 1 + numbers[i]) {
        Dims sides{};
        sides.nbDims = numbers[i];
        for (int32_t d = 0; d < sides.nbDims; ++d) sides.d[d] = numbers[i + 1 + d];
        found.push_back(sides);
    }
    return found;
}

bool equal(const PluginFieldCollection& a, const PluginFieldCollection& b) {
    if (a.nbFields != b.nbFields) return false;
    for (int32_t i = 0; i < a.nbFields; ++i) {
        const PluginField &x = a.fields[i], &y = *find(b, x.name);
        const size_t size = static_cast<size_t>(x.length) * (x.type == PluginFieldType::kINT32 ? 4 : 1);
        if (x.type != y.type || x.length != y.length || std::memcmp(x.data, y.data, size) != 0) return false;
    }
    return true;
}

void print_shape(IPluginV3OneBuild* build, const std::vector<Dims>& inputs) {
    Builder builder;
    std::vector<DimsExprs> given;
    for (const Dims& sides : inputs) {
        DimsExprs one{};
        one.nbDims = sides.nbDims;
        for (int32_t d = 0; d < sides.nbDims; ++d) one.d[d] = builder.constant(sides.d[d]);
        given.push_back(one);
    }
    DimsExprs out{};
    const int32_t code =
        build->getOutputShapes(given.data(), static_cast<int32_t>(given.size()), nullptr, 0, &out, 1, builder);
    std::cout << "shape " << code;
    for (int32_t d = 0; code == 0 && d < out.nbDims; ++d) std::cout << ' ' << out.d[d]->getConstantValue();
    std::cout << '\n';
}

std::vector<DynamicPluginTensorDesc> descriptions(const std::vector<Dims>& inputs, DataType type, TensorFormat format) {
    std::vector<DynamicPluginTensorDesc> all(inputs.size() + 1);
    for (size_t i = 0; i < all.size(); ++i) {
        all[i].desc.type = type, all[i].desc.format = format;
        if (i < inputs.size()) all[i].desc.dims = all[i].min = all[i].max = all[i].opt = inputs[i];
    }
    return all;
}

int describe(IPluginCreatorV3One* creator, const Fields& fields, IPluginV3* plugin) {
    std::cout << "creator " << kind(creator) << ' ' << creator->getPluginNamespace() << "::" << creator->getPluginName()
              << ' ' << creator->getPluginVersion() << "\nfields";
    for (int32_t i = 0; i < creator->getFieldNames()->nbFields; ++i) {
        const PluginField& form = creator->getFieldNames()->fields[i];
        std::cout << ' ' << form.name << (form.type == PluginFieldType::kINT32 ? "#" : "");
    }
    auto* const core = ability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    auto* const build = ability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    auto* const runtime = ability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    std::cout << "\nplugin " << kind(plugin) << ", " << kind(core) << ", " << kind(build) << ", " << kind(runtime)
              << ' ' << core->getPluginNamespace() << "::" << core->getPluginName() << ' ' << core->getPluginVersion()
              << '\n';
    const std::vector<Dims> inputs = shapes(fields.collection);
    const auto count = static_cast<int32_t>(inputs.size());
    print_shape(build, inputs);
    for (const DataType type : {DataType::kINT8, DataType::kHALF}) {
        const std::vector<DataType> given(inputs.size(), type);
        DataType made = DataType::kBOOL;
        const int32_t code = build->getOutputDataTypes(&made, 1, given.data(), count);
        std::cout << "type " << static_cast<int>(type) << ' ' << code << ' ' << static_cast<int>(made) << '\n';
    }
    std::cout << "formats";
    for (int type = 0; type < 12; ++type) {
        for (int format = 0; format < 13; ++format) {
            const auto all = descriptions(inputs, static_cast<DataType>(type), static_cast<TensorFormat>(format));
            for (int32_t place = -1; place <= count + 1; ++place) {
                if (place > count && format > 0) continue;
                const bool taken = place <= count && build->supportsFormatCombination(place, all.data(), count, 1);
                if (taken) std::cout << ' ' << place << ':' << type << '/' << format;
            }
        }
    }
    auto all = descriptions(inputs, DataType::kINT8, TensorFormat::kCHW32);
    std::cout << '\n';
    const int32_t right = build->configurePlugin(all.data(), count, all.data() + count, 1);
    all[0].max.d[0] += 1;
    const int32_t larger = build->configurePlugin(all.data(), count, all.data() + count, 1);
    const int32_t more = build->configurePlugin(all.data(), count + 1, all.data(), 1);
    std::cout << "configure " << right << ' ' << larger << ' ' << more << "\noutputs " << build->getNbOutputs()
              << " workspace " << build->getWorkspaceSize(all.data(), count, all.data() + count, 1) << " tactics "
              << build->getNbTactics() << "\ntiming " << build->getTimingCacheID() << "\nmetadata "
              << build->getMetadataString() << '\n';
    const PluginFieldCollection* const kept = runtime->getFieldsToSerialize();
    const std::unique_ptr<IPluginV3> again(creator->createPlugin("again", kept, TensorRTPhase::kRUNTIME));
    const std::unique_ptr<IPluginV3> copy(plugin->clone());
    std::cout << "serialised " << equal(fields.collection, *kept);
    for (IPluginV3* const one : {again.get(), copy.get()}) {
        auto* const other = ability<IPluginV3OneRuntime>(one, PluginCapabilityType::kRUNTIME);
        const char* const id = ability<IPluginV3OneBuild>(one, PluginCapabilityType::kBUILD)->getTimingCacheID();
        std::cout << ' ' << equal(fields.collection, *other->getFieldsToSerialize())
                  << (std::strcmp(id, build->getTimingCacheID()) == 0);
    }
    std::cout << '\n';
    return 0;
}

// The calls of the driver that a host needs for memory, from the same library that the plugin finds.
struct Driver {
    Driver() : library(dlopen("libcuda.so.1", RTLD_NOW)) {}
    template <typename... Values>
    int call(const char* name, Values... values) const {
        auto* const made = reinterpret_cast<int (*)(Values...)>(dlsym(library, name));
        return made != nullptr ? made(values...) : -1;
    }
    void need(int code, const char* what) const {
        if (code != 0) std::exit((std::cout << "driver: " << what << ' ' << code << '\n', 2));
    }
    void* const library;
};

int enqueue(const Fields& fields, IPluginV3* plugin, IPluginV3* twin, const std::string& made,
            const std::vector<std::string>& given, const std::string& wrong) {
    const Driver driver;
    if (driver.library != nullptr) {
        void* context = nullptr;
        driver.need(driver.call("cuInit", 0u), "init");
        if (wrong != "context") driver.need(driver.call("cuCtxCreate_v2", &context, 0u, 0), "context");
    }
    // Two execution contexts of one engine and one of another, each of which ends after its frame.
    std::deque<std::unique_ptr<IPluginV3>> attached;
    for (IPluginV3* const one : {plugin, plugin, twin}) {
        attached.emplace_back(
            ability<IPluginV3OneRuntime>(one, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr));
        std::cout << "attached " << (attached.back() != nullptr) << '\n';
        if (attached.back() == nullptr) return 0;
    }
    const auto runtime = [&attached]() {
        return ability<IPluginV3OneRuntime>(attached.front().get(), PluginCapabilityType::kRUNTIME);
    };
    std::vector<PluginTensorDesc> in;
    for (const Dims& sides : shapes(fields.collection)) {
        in.push_back({sides, DataType::kINT8, TensorFormat::kCHW32, 1.0F});
    }
    const PluginTensorDesc out{};
    if (wrong == "shape") in[0].dims.d[2] += 1;
    const auto count = static_cast<int32_t>(in.size());
    const int32_t changed = runtime()->onShapeChange(in.data(), count, &out, 1);
    std::cout << "shape change " << changed << '\n';
    std::vector<std::vector<char>> inputs;
    for (const std::string& path : given) inputs.push_back(contents(path));
    std::vector<char> result = contents(made);
    std::vector<uint64_t> memory;
    const auto upload = [&](const std::vector<char>& bytes) {
        uint64_t place = 0;
        driver.need(driver.call("cuMemAlloc_v2", &place, bytes.size()), "allocate");
        const void* const from = bytes.data();
        driver.need(driver.call("cuMemcpyHtoD_v2", place, from, bytes.size()), "upload");
        memory.push_back(place);
    };
    for (const auto& input : inputs) upload(input);
    upload(result);
    std::vector<const void*> places;
    for (const uint64_t place : memory) {
        places.push_back(reinterpret_cast<const void*>(wrong == "address" ? place + 8 : place));
    }
    void* const target = const_cast<void*>(places.back());
    void* stream = nullptr;
    driver.need(driver.call("cuStreamCreate", &stream, 0u), "stream");
    for (int frame = 0; frame < 3; ++frame) {
        const int32_t code = runtime()->enqueue(in.data(), &out, places.data(), &target, nullptr,
                                                static_cast<cudaStream_t>(stream));
        std::cout << "enqueue " << code << " waited " << driver.call("cuStreamSynchronize", stream) << '\n';
        if (attached.size() > 1) attached.pop_front();
    }
    void* const back = result.data();
    driver.need(driver.call("cuMemcpyDtoH_v2", back, memory.back(), result.size()), "download");
    std::ofstream(made, std::ios::binary).write(result.data(), static_cast<long>(result.size()));
    driver.call("cuStreamDestroy_v2", stream);
    for (const uint64_t place : memory) driver.need(driver.call("cuMemFree_v2", place), "free");
    return 0;
}

}  // namespace

int main(int count, char** words) {
    std::vector<std::string> given(words + 1, words + count);
    std::string wrong;
    if (given.size() > 2 && given[given.size() - 2] == "--") {
        wrong = given.back();
        given.resize(given.size() - 2);
    }
    void* const library = dlopen(given.at(0).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return std::cout << dlerror() << '\n', 2;
    static Finder finder;
    if (wrong != "silent") reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    const auto all = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t creators = 0;
    auto* const creator = static_cast<IPluginCreatorV3One*>(all(creators)[0]);
    if (creators != 1) return std::cout << creators << " creators\n", 2;
    const Fields fields(given.at(1));
    const std::unique_ptr<IPluginV3> plugin(creator->createPlugin("node", &fields.collection, TensorRTPhase::kBUILD));
    std::cout << "created " << (plugin != nullptr) << '\n';
    if (plugin == nullptr) return 0;
    const std::string& what = given.at(2);
    if (what == "describe") return describe(creator, fields, plugin.get());
    const std::unique_ptr<IPluginV3> twin(creator->createPlugin("twin", &fields.collection, TensorRTPhase::kRUNTIME));
    const std::vector<std::string> inputs(given.begin() + 4, given.end());
    if (what == "enqueue") return enqueue(fields, plugin.get(), twin.get(), given.at(3), inputs, wrong);
    return 2;
}
