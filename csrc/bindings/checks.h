// Argument checks that say what was expected and what came; the same for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "layout_view.h"

namespace dynaprune::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << "]";
  return text.str();
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), op, ": expected ", name, " of the dtype of ", other_name,
                  " (", torch::headeronly::toString(other.scalar_type()), "), got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": expected ", name, " ", shape, ", got shape ", shape_of(t));
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(shape_of(t) == shape_of(other), op, ": expected ", name, " of the shape of ", other_name, " ",
                  shape_of(other), ", got ", shape_of(t));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": expected contiguous ", name, ", got other strides");
}

// Values [capacity, bi, bo], contiguous.
inline void check_block_values(const char* op, const char* name, const Tensor& values) {
  check_dim(op, name, values, 3, "[capacity, bi, bo]");
  STD_TORCH_CHECK(values.size(1) >= 1 && values.size(2) >= 1, op, ": expected ", name,
                  " with blocks of at least 1 x 1, got shape ", shape_of(values));
  check_contiguous(op, name, values);
}

inline void check_bias(const char* op, const Tensor& bias, int64_t outputs, const Tensor& x) {
  check_same_dtype(op, "bias", bias, "x", x);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == outputs, op, ": expected bias [", outputs, "], got shape ",
                  shape_of(bias));
}

inline void check_index_memory(const char* op, const Tensor& index) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int, op, ": expected an int32 index, got ",
                  torch::headeronly::toString(index.scalar_type()));
  check_dim(op, "index", index, 1, "[size]");
  check_contiguous(op, "index", index);
}

// A packed index whose length must fit the sizes.
inline void check_index(const char* op, const Tensor& index, int64_t rows, int64_t columns, int64_t lists,
                        int64_t capacity) {
  check_index_memory(op, index);
  STD_TORCH_CHECK(capacity >= 0, op, ": expected capacity >= 0, got ", capacity);
  const int64_t expected = packed_index_size(rows, lists, capacity);
  STD_TORCH_CHECK(index.numel() == expected, op, ": expected an index of ", expected, " elements for ", rows,
                  " block rows, ", columns, " block columns, ", lists, " column lists and capacity ", capacity,
                  ", got ", index.numel());
}

// The column lists that explain an index's length.
inline int64_t lists_of_index(const char* op, const Tensor& index, int64_t rows, int64_t capacity) {
  check_index_memory(op, index);
  const int64_t rest = index.numel() - packed_index_size(rows, 0, capacity);
  STD_TORCH_CHECK(rest >= 0 && rest % 2 == 0, op, ": expected an index of ", packed_index_size(rows, 0, capacity),
                  " + 2 x lists elements for ", rows, " block rows and capacity ", capacity, ", got ", index.numel());
  return rest / 2;
}

constexpr int64_t kConvNumbers = 9;

// conv = [kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups].
inline void check_conv(const char* op, const Ints& conv) {
  STD_TORCH_CHECK(int64_t(conv.size()) == kConvNumbers, op,
                  ": expected conv = [kh, kw, sh, sw, ph, pw, dh, dw, groups], got ", conv.size(), " numbers");
  for (int64_t i = 0; i < kConvNumbers; ++i) {
    const bool padding = i == 4 || i == 5;
    STD_TORCH_CHECK(conv[i] >= (padding ? 0 : 1), op, ": expected conv[", i, "] >= ", padding ? 0 : 1, ", got ",
                    conv[i]);
  }
}

inline void check_conv_channels(const char* op, int64_t in, int64_t out, int64_t groups, int64_t bo) {
  STD_TORCH_CHECK(in % groups == 0 && out % groups == 0, op, ": expected channels divisible by ", groups,
                  " groups, got ", in, " in and ", out, " out");
  STD_TORCH_CHECK(groups == 1 || out / groups % bo == 0, op, ": expected out / groups (", out / groups,
                  ") to be a multiple of the block's outputs (", bo, ")");
}

inline int64_t output_length(const char* op, int64_t length, int64_t kernel, int64_t stride, int64_t padding,
                             int64_t dilation) {
  const int64_t room = length + 2 * padding - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0, op, ": expected an input of at least ", dilation * (kernel - 1) + 1,
                  " pixels after padding, got ", length, " with padding ", padding);
  return room / stride + 1;
}

inline void check_pair(const char* op, const char* name, const Ints& pair) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= 1 && pair[1] >= 1, op, ": expected two positive integers as ", name,
                  ", got ", pair.size(), pair.empty() ? "" : " of which the first is ",
                  pair.empty() ? int64_t(0) : pair[0]);
}

// The arguments of layout_update as `Shape`, an aggregate of its sizes in this order.
template <class Shape>
Shape layout_shape(const char* op, const Tensor& mask, const Tensor& slot_of_block, int64_t capacity, int64_t groups,
                   const Ints& kernel, const Ints& stride, const Ints& dilation) {
  check_dim(op, "mask", mask, 2, "[rows, columns]");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": expected a bool mask, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  check_contiguous(op, "mask", mask);
  STD_TORCH_CHECK(slot_of_block.scalar_type() == ScalarType::Int, op, ": expected an int32 slot_of_block, got ",
                  torch::headeronly::toString(slot_of_block.scalar_type()));
  check_same_shape(op, "slot_of_block", slot_of_block, "mask", mask);
  check_contiguous(op, "slot_of_block", slot_of_block);
  check_pair(op, "kernel", kernel);
  check_pair(op, "stride", stride);
  check_pair(op, "dilation", dilation);
  STD_TORCH_CHECK(capacity >= 0 && groups >= 1, op, ": expected capacity >= 0 and groups >= 1, got ", capacity, " and ",
                  groups);
  const int64_t rows = mask.size(0), columns = mask.size(1), taps = kernel[0] * kernel[1];
  STD_TORCH_CHECK(rows % groups == 0, op, ": expected block rows divisible by groups = ", groups, ", got ", rows);
  STD_TORCH_CHECK(columns % taps == 0, op, ": expected block columns divisible by the kernel's ", taps, " taps, got ",
                  columns);
  STD_TORCH_CHECK(mask.numel() <= INT32_MAX, op, ": expected fewer than 2^31 blocks, got ", mask.numel());
  return {rows, columns, capacity, groups, kernel[0], kernel[1], stride[0], stride[1], dilation[0], dilation[1]};
}

}  // namespace dynaprune::bindings
