// What a plugin node says: one kernel launch, as fields that a network file and a plan carry alike.
//
// Binary fields travel as base64: plain text survives whatever a parser does with the strings of a node.
#pragma once
#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace igate {

// The device address of a tensor or table, written into the arguments at `at`.
struct Pointer {
    int32_t at, source, offset;  // source: an input, the number of inputs for the output, kTables
};
constexpr int32_t kTables = -1;

// One side of the output: (side `value` of an input + add) / divide, rounded down; or `value` itself.
struct Side {
    int32_t input, value, add, divide;  // input: kConstant for a number
};
constexpr int32_t kConstant = -1;

struct Tensor {
    nvinfer1::DataType type;
    nvinfer1::TensorFormat format;
};

struct Field {
    std::string name;
    nvinfer1::PluginFieldType type;
    std::string text;              // kCHAR
    std::vector<int32_t> numbers;  // kINT32
};

// The names and types that a network file must give; values are empty.
const std::vector<Field>& fields();

class Spec {
public:
    // Throws std::invalid_argument with a sentence for whatever is no launch that could be safe.
    explicit Spec(const nvinfer1::PluginFieldCollection& given);
    Spec(const Spec&) = delete;
    Spec& operator=(const Spec&) = delete;

    std::string kernel, image, params, tables;
    std::vector<int32_t> arguments;  // where each argument of the kernel starts in `params`
    std::vector<Pointer> pointers;
    std::vector<int32_t> grid, block;
    int32_t shared = 0;
    std::vector<std::vector<int64_t>> inputs;  // the sides that the launch was made for
    std::vector<Side> output;
    std::vector<Tensor> tensors;  // inputs, then the output

    // The fields as they were given; valid as long as this object.
    const nvinfer1::PluginFieldCollection& serialised() const { return collection; }
    // Equal for equal fields: names this launch in a timing cache.
    const std::string& digest() const { return identity; }
    // A sentence for sides that the launch was not made for, else "".
    std::string mismatch(const nvinfer1::Dims& sides, size_t input) const;
    // The output's sides for the inputs that the launch was made for.
    std::vector<int64_t> result() const;

private:
    void read();
    void check() const;
    void check_launch() const;
    void check_output() const;
    const Field& field(const char* name) const;
    std::string decoded(const char* name) const;

    std::vector<Field> values;
    std::vector<nvinfer1::PluginField> views;
    nvinfer1::PluginFieldCollection collection{};
    std::string identity;
};

}  // namespace igate
