#include "spec.hpp"

#include <cstring>
#include <stdexcept>

namespace igate {

using nvinfer1::PluginFieldType;

namespace {

constexpr int32_t kMostThreads = 1024, kMostRank = nvinfer1::Dims::MAX_DIMS;
constexpr int64_t kMostBlocks[] = {2147483647, 65535, 65535};
constexpr size_t kMostParams = 4096;  // of any kernel before CUDA 12.1, and of ours

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

int sextet(char letter) {
    if (letter >= 'A' && letter <= 'Z') return letter - 'A';
    if (letter >= 'a' && letter <= 'z') return letter - 'a' + 26;
    if (letter >= '0' && letter <= '9') return letter - '0' + 52;
    return letter == '+' ? 62 : letter == '/' ? 63 : -1;
}

Field copied(const Field& form, const nvinfer1::PluginField& from) {
    if (from.type != form.type) refuse("field " + form.name + " has another type");
    if (from.length < 0 || (from.length > 0 && from.data == nullptr)) refuse("field " + form.name + " has no data");
    Field field = form;
    const auto count = static_cast<size_t>(from.length);
    if (form.type == PluginFieldType::kCHAR) {
        // Some callers count the zero at the end, some do not.
        field.text.assign(static_cast<const char*>(from.data), count);
        field.text.resize(std::strlen(field.text.c_str()));
    } else if (count > 0) {
        field.numbers.resize(count);
        std::memcpy(field.numbers.data(), from.data, count * sizeof(int32_t));
    }
    return field;
}

}  // namespace

const std::vector<Field>& fields() {
    constexpr auto text = PluginFieldType::kCHAR, numbers = PluginFieldType::kINT32;
    static const std::vector<Field> forms{
        {"kernel", text, "", {}},       {"image", text, "", {}},    {"params", text, "", {}},
        {"tables", text, "", {}},       {"arguments", numbers, "", {}}, {"pointers", numbers, "", {}},
        {"grid", numbers, "", {}},      {"block", numbers, "", {}}, {"shared", numbers, "", {}},
        {"inputs", numbers, "", {}},    {"output", numbers, "", {}}, {"tensors", numbers, "", {}},
    };
    return forms;
}

Spec::Spec(const nvinfer1::PluginFieldCollection& given) {
    if (given.nbFields < 0 || (given.nbFields > 0 && given.fields == nullptr)) refuse("there are no fields");
    for (const Field& form : fields()) {
        const nvinfer1::PluginField* found = nullptr;
        for (int32_t i = 0; i < given.nbFields; ++i) {
            if (given.fields[i].name == nullptr || form.name != given.fields[i].name) continue;
            if (found != nullptr) refuse("field " + form.name + " is given twice");
            found = given.fields + i;
        }
        if (found == nullptr) refuse("field " + form.name + " is missing");
        values.push_back(copied(form, *found));
    }
    read();
    check();
    uint64_t hash = 14695981039346656037ull;  // FNV-1a
    const auto mix = [&hash](const void* data, size_t bytes) {
        const auto* const all = static_cast<const unsigned char*>(data);
        for (size_t i = 0; i < bytes; ++i) hash = (hash ^ all[i]) * 1099511628211ull;
    };
    for (const Field& value : values) {
        const bool text = value.type == PluginFieldType::kCHAR;
        const void* const data = text ? static_cast<const void*>(value.text.data()) : value.numbers.data();
        const size_t count = text ? value.text.size() : value.numbers.size();
        mix(data, text ? count : count * sizeof(int32_t));
        mix(value.name.data(), value.name.size());
        views.emplace_back(value.name.c_str(), data, value.type, static_cast<int32_t>(count));
    }
    collection.nbFields = static_cast<int32_t>(views.size());
    collection.fields = views.data();
    identity = kernel + ".";
    for (int shift = 60; shift >= 0; shift -= 4) identity += "0123456789abcdef"[hash >> shift & 15];
}

const Field& Spec::field(const char* name) const {
    for (const Field& value : values) {
        if (value.name == name) return value;
    }
    refuse(std::string("field ") + name + " is missing");
}

std::string Spec::decoded(const char* name) const {
    const std::string& text = field(name).text;
    size_t length = text.size();
    if (length % 4 != 0) refuse(std::string("field ") + name + " is cut off");
    for (int padding = 0; padding < 2 && length > 0 && text[length - 1] == '='; ++padding) --length;
    std::string bytes;
    bytes.reserve(length / 4 * 3 + 2);
    uint32_t bits = 0;
    for (size_t i = 0; i < length; ++i) {
        const int value = sextet(text[i]);
        if (value < 0) refuse(std::string("field ") + name + " is not base64");
        bits = bits << 6 | static_cast<uint32_t>(value);
        if (i % 4 != 0) bytes += static_cast<char>(bits >> (6 - i % 4 * 2) & 255);
    }
    return bytes;
}

void Spec::read() {
    kernel = field("kernel").text;
    image = decoded("image"), params = decoded("params"), tables = decoded("tables");
    arguments = field("arguments").numbers, grid = field("grid").numbers, block = field("block").numbers;
    const auto& bytes = field("shared").numbers;
    if (bytes.size() != 1) refuse("field shared is not one number");
    shared = bytes[0];
    const auto& places = field("pointers").numbers;
    if (places.size() % 3 != 0) refuse("field pointers is cut off");
    for (size_t i = 0; i < places.size(); i += 3) pointers.push_back({places[i], places[i + 1], places[i + 2]});
    const auto& sides = field("inputs").numbers;
    for (size_t i = 0; i < sides.size();) {
        const int32_t rank = sides[i++];
        const bool whole = rank >= 0 && rank <= kMostRank && sides.size() - i >= static_cast<size_t>(rank);
        if (!whole) refuse("field inputs is cut off");
        const auto first = sides.begin() + static_cast<int64_t>(i);
        inputs.emplace_back(first, first + rank);
        i += static_cast<size_t>(rank);
    }
    const auto& rules = field("output").numbers;
    if (rules.size() % 4 != 0) refuse("field output is cut off");
    for (size_t i = 0; i < rules.size(); i += 4) {
        output.push_back({rules[i], rules[i + 1], rules[i + 2], rules[i + 3]});
    }
    const auto& kinds = field("tensors").numbers;
    if (kinds.size() % 2 != 0) refuse("field tensors is cut off");
    for (size_t i = 0; i < kinds.size(); i += 2) {
        const auto type = static_cast<nvinfer1::DataType>(kinds[i]);
        tensors.push_back({type, static_cast<nvinfer1::TensorFormat>(kinds[i + 1])});
    }
}

void Spec::check() const {
    if (kernel.empty()) refuse("the kernel has no name");
    const bool known = image.compare(0, 4, "\x7f" "ELF") == 0 || image.find(".version ") != std::string::npos;
    if (!known) refuse("the image is neither a cubin nor PTX");
    if (inputs.empty() || tensors.size() != inputs.size() + 1) refuse("types and formats do not fit the tensors");
    check_launch();
    check_output();
}

void Spec::check_launch() const {
    if (grid.size() != 3 || block.size() != 3 || shared < 0) refuse("grid, block and shared memory are no launch");
    int64_t threads = 1;
    for (size_t i = 0; i < 3; ++i) {
        if (grid[i] < 1 || grid[i] > kMostBlocks[i]) refuse("the grid has an impossible side");
        if (block[i] < 1 || block[i] > kMostThreads) refuse("the block has an impossible side");
        threads *= block[i];
    }
    if (threads > kMostThreads) refuse("the block has more than 1024 threads");
    if (params.size() > kMostParams) refuse("the arguments are too large");
    const auto size = static_cast<int64_t>(params.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
        const int64_t before = i == 0 ? -1 : arguments[i - 1];
        if (arguments[i] <= before || arguments[i] >= size) refuse("an argument lies outside of the arguments' bytes");
    }
    for (const Pointer& one : pointers) {
        const int64_t at = one.at, offset = one.offset;
        if (at < 0 || at % 8 != 0 || at + 8 > size) refuse("a pointer lies outside of the arguments");
        if (one.source < kTables || one.source > static_cast<int64_t>(inputs.size())) refuse("a pointer has no source");
        const bool inside = one.source != kTables || offset < static_cast<int64_t>(tables.size());
        if (offset < 0 || !inside) refuse("a pointer points beyond its tables");
    }
}

void Spec::check_output() const {
    if (output.empty() || output.size() > static_cast<size_t>(kMostRank)) refuse("the output has no shape");
    for (const Side& side : output) {
        if (side.input == kConstant) continue;
        if (side.input < 0 || static_cast<size_t>(side.input) >= inputs.size()) refuse("a side follows no input");
        const auto rank = static_cast<int64_t>(inputs[static_cast<size_t>(side.input)].size());
        if (side.value < 0 || side.value >= rank || side.divide < 1) refuse("a side follows no side of its input");
    }
    for (const int64_t side : result()) {
        if (side < 1) refuse("the output has an empty side");
    }
}

std::string Spec::mismatch(const nvinfer1::Dims& sides, size_t input) const {
    bool same = input < inputs.size() && sides.nbDims == static_cast<int32_t>(inputs[input].size());
    for (int32_t i = 0; same && i < sides.nbDims; ++i) same = sides.d[i] == inputs[input][static_cast<size_t>(i)];
    return same ? "" : "input " + std::to_string(input) + " has another shape than the launch was made for";
}

std::vector<int64_t> Spec::result() const {
    std::vector<int64_t> sides;
    for (const Side& side : output) {
        if (side.input == kConstant) {
            sides.push_back(side.value);
            continue;
        }
        const int64_t sum = inputs[static_cast<size_t>(side.input)][static_cast<size_t>(side.value)] + side.add;
        sides.push_back(sum < 0 ? 0 : sum / side.divide);
    }
    return sides;
}

}  // namespace igate
