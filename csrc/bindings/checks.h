// Argument checks that say what was expected and what came; the same for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "layout_view.h"

namespace dynaprune::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Sizes up to here, of blocks up to there, keep every product of three sizes in 64 bits.
constexpr int64_t kLargestSize = INT32_MAX;
constexpr int64_t kLargestBlock = 1024;

// For a >= 0 and b > 0.
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

inline void check_size(const char* op, const char* name, int64_t size, int64_t least = 0) {
  STD_TORCH_CHECK(size >= least, op, ": expected ", name, " >= ", least, ", got ", size);
  STD_TORCH_CHECK(size <= kLargestSize, op, ": expected ", name, " <= ", kLargestSize, ", got ", size);
}

// The product of sizes, each at most kLargestSize.
inline int64_t checked_product(const char* op, const char* name, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    product *= size;
    check_size(op, name, product);
  }
  return product;
}

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

// The storage holds all elements: `untyped_storage().resize_` takes memory away and leaves the sizes.
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  int64_t last = t.storage_offset(), bytes = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return;
    last += (t.size(d) - 1) * t.stride(d);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(last < bytes / int64_t(t.element_size()), op, ": expected ", name, " ", shape_of(t),
                  " with its memory, got a storage of ", bytes, " bytes");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": expected contiguous ", name, ", got other strides");
}

inline void check_block_sizes(const char* op, int64_t bi, int64_t bo) {
  STD_TORCH_CHECK(bi >= 1 && bo >= 1, op, ": expected a block of at least 1 x 1, got ", bi, " x ", bo);
  STD_TORCH_CHECK(bi <= kLargestBlock && bo <= kLargestBlock, op, ": expected a block of at most ", kLargestBlock,
                  " x ", kLargestBlock, ", got ", bi, " x ", bo);
}

// Two contiguous tensors of one device share no memory.
inline void check_disjoint(const char* op, const char* name, const Tensor& a, const char* other_name, const Tensor& b) {
  const uintptr_t from_a = reinterpret_cast<uintptr_t>(a.const_data_ptr()), to_a = from_a + a.numel() * a.element_size();
  const uintptr_t from_b = reinterpret_cast<uintptr_t>(b.const_data_ptr()), to_b = from_b + b.numel() * b.element_size();
  STD_TORCH_CHECK(to_a <= from_b || to_b <= from_a, op, ": expected ", name, " and ", other_name,
                  " in memory of their own, got tensors that overlap");
}

// Values [capacity, bi, bo], contiguous.
inline void check_block_values(const char* op, const char* name, const Tensor& values) {
  check_dim(op, name, values, 3, "[capacity, bi, bo]");
  check_block_sizes(op, values.size(1), values.size(2));
  check_contiguous(op, name, values);
  check_storage(op, name, values);
}

inline void check_bias(const char* op, const Tensor& bias, int64_t outputs, const Tensor& x) {
  check_same_dtype(op, "bias", bias, "x", x);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == outputs, op, ": expected bias [", outputs, "], got shape ",
                  shape_of(bias));
  check_storage(op, "bias", bias);
}

inline void check_index_memory(const char* op, const Tensor& index) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int, op, ": expected an int32 index, got ",
                  torch::headeronly::toString(index.scalar_type()));
  check_dim(op, "index", index, 1, "[size]");
  check_contiguous(op, "index", index);
  check_storage(op, "index", index);
}

// Numbers of blocks are int32, and so is everything in an index.
inline void check_grid(const char* op, int64_t rows, int64_t columns, int64_t lists, int64_t capacity) {
  check_size(op, "block rows", rows);
  check_size(op, "block columns", columns);
  check_size(op, "column lists", lists);
  check_size(op, "capacity", capacity);
  STD_TORCH_CHECK(rows * columns <= kLargestSize, op, ": expected fewer than 2^31 blocks, got ", rows, " x ", columns);
}

// A packed index whose length must fit the sizes.
inline void check_index(const char* op, const Tensor& index, int64_t rows, int64_t columns, int64_t lists,
                        int64_t capacity) {
  check_index_memory(op, index);
  check_grid(op, rows, columns, lists, capacity);
  const int64_t expected = packed_index_size(rows, lists, capacity);
  STD_TORCH_CHECK(index.numel() == expected, op, ": expected an index of ", expected, " elements for ", rows,
                  " block rows, ", columns, " block columns, ", lists, " column lists and capacity ", capacity,
                  ", got ", index.numel());
}

// The column lists that explain an index's length.
inline int64_t lists_of_index(const char* op, const Tensor& index, int64_t rows, int64_t capacity) {
  check_index_memory(op, index);
  check_size(op, "block rows", rows);
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
    const int64_t least = i == 4 || i == 5 ? 0 : 1;
    STD_TORCH_CHECK(conv[i] >= least && conv[i] <= kLargestSize, op, ": expected conv[", i, "] from ", least, " to ",
                    kLargestSize, ", got ", conv[i]);
  }
  check_size(op, "taps of the kernel", conv[0] * conv[1]);
  check_size(op, "stride phases", conv[2] * conv[3]);
  check_size(op, "reach of the kernel", (conv[0] - 1) * conv[6]);
  check_size(op, "reach of the kernel", (conv[1] - 1) * conv[7]);
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
  STD_TORCH_CHECK(pair.size() == 2, op, ": expected two positive integers as ", name, ", got ", pair.size());
  check_size(op, name, pair[0], 1);
  check_size(op, name, pair[1], 1);
}

// The arguments of layout_update as `Shape`, an aggregate of its sizes in this order.
template <class Shape>
Shape layout_shape(const char* op, const Tensor& mask, const Tensor& slot_of_block, int64_t capacity, int64_t groups,
                   const Ints& kernel, const Ints& stride, const Ints& dilation) {
  check_dim(op, "mask", mask, 2, "[rows, columns]");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": expected a bool mask, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  check_contiguous(op, "mask", mask);
  check_storage(op, "mask", mask);
  STD_TORCH_CHECK(slot_of_block.scalar_type() == ScalarType::Int, op, ": expected an int32 slot_of_block, got ",
                  torch::headeronly::toString(slot_of_block.scalar_type()));
  check_same_shape(op, "slot_of_block", slot_of_block, "mask", mask);
  check_contiguous(op, "slot_of_block", slot_of_block);
  check_storage(op, "slot_of_block", slot_of_block);
  check_pair(op, "kernel", kernel);
  check_pair(op, "stride", stride);
  check_pair(op, "dilation", dilation);
  const int64_t rows = mask.size(0), columns = mask.size(1), taps = kernel[0] * kernel[1];
  check_size(op, "groups", groups, 1);
  check_size(op, "taps of the kernel", taps);
  check_size(op, "stride phases", stride[0] * stride[1]);
  check_size(op, "reach of the kernel", (kernel[0] - 1) * dilation[0]);
  check_size(op, "reach of the kernel", (kernel[1] - 1) * dilation[1]);
  check_grid(op, rows, columns, 0, capacity);
  STD_TORCH_CHECK(rows >= 1 && columns >= 1, op, ": expected at least one block, got shape ", shape_of(mask));
  STD_TORCH_CHECK(rows % groups == 0, op, ": expected block rows divisible by groups = ", groups, ", got ", rows);
  STD_TORCH_CHECK(columns % taps == 0, op, ": expected block columns divisible by the kernel's ", taps, " taps, got ",
                  columns);
  const int64_t channel_blocks = columns / taps;
  checked_product(op, "column lists", {groups, channel_blocks, stride[0] * stride[1]});
  return {rows, columns, capacity, groups, kernel[0], kernel[1], stride[0], stride[1], dilation[0], dilation[1]};
}

}  // namespace dynaprune::bindings
