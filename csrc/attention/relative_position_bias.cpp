#include "attention/relative_position_bias.h"

#include "tensor.h"

namespace udl {
namespace {

int64_t chunks_of(const RelativePositionBias& args) {
  return (args.positions + args.chunk - 1) / args.chunk;
}

template <class Kernel>
void run(const RelativePositionBias& args, int64_t elements, Kernel kernel) {
  parallel_units(chunks_of(args), elements,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The arguments that both directions share. Nothing is read by a value of the index before all of them
// are known to be in range.
RelativePositionBias arguments(Dtype dtype, const Tensor& index, int64_t n, int64_t heads,
                               int64_t chunk) {
  RelativePositionBias args;
  args.dtype = dtype;
  args.wide_index = index.scalar_type() == ScalarType::Long;
  args.index = index.const_data_ptr();
  args.n = n;
  args.heads = heads;
  args.positions = index.numel();
  args.chunk = chunk;
  int64_t lanes = 1;
  UDL_CALL(relative_position_lanes)(acc_dtype(dtype), &lanes);
  args.row = (heads + lanes - 1) / lanes * lanes;
  std::vector<uint8_t> fits(static_cast<size_t>(chunks_of(args)));
  args.fits = fits.data();
  run(args, args.chunk / 4, UDL_CALL(relative_position_fits));
  args.fits = nullptr;
  STD_TORCH_CHECK(std::all_of(fits.begin(), fits.end(), [](uint8_t fit) { return fit != 0; }),
                  "udlkernels: an index lies outside of the table");
  return args;
}

// A table whose rows are whole vectors, and its memory where it had to be copied.
const void* padded_table(const Tensor& table, int64_t row, std::vector<char>& memory) {
  const int64_t heads = table.size(1);
  if (row == heads) return table.const_data_ptr();
  const size_t size = static_cast<size_t>(element_size(dtype_of(table)));
  const size_t from_row = static_cast<size_t>(heads) * size;
  const size_t to_row = static_cast<size_t>(row) * size;
  memory.resize(static_cast<size_t>(table.size(0)) * to_row);
  const char* from = static_cast<const char*>(table.const_data_ptr());
  for (size_t r = 0; r < static_cast<size_t>(table.size(0)); ++r) {
    std::copy_n(from + r * from_row, from_row, memory.data() + r * to_row);
  }
  return memory.data();
}

Tensor relative_position_bias_fwd(const Tensor& table, const Tensor& index) {
  constexpr int64_t kChunk = 1024;  // a head's part of a chunk is a page of float32
  const Dtype dtype = dtype_of(table);
  RelativePositionBias args = arguments(dtype, index, table.size(0), table.size(1), kChunk);
  std::vector<char> memory;
  args.table = padded_table(table, args.row, memory);
  Tensor out = empty({args.heads, index.size(0), index.size(1)}, dtype);
  args.out = out.mutable_data_ptr();
  run(args, args.chunk * args.heads, UDL_CALL(relative_position_gather));
  return out;
}

Tensor relative_position_bias_bwd(const Tensor& dout, const Tensor& index, int64_t n) {
  const Dtype dtype = dtype_of(dout), acc = acc_dtype(dtype);
  RelativePositionBias args =
      arguments(dtype, index, n, dout.size(0), relative_position_chunk(n));
  const int64_t chunks = chunks_of(args);
  std::vector<char> partials(static_cast<size_t>(chunks * n * args.heads * element_size(acc)));
  args.dout = dout.const_data_ptr();
  args.partials = partials.data();
  run(args, args.chunk * args.heads, UDL_CALL(relative_position_sum));
  Tensor dtable = empty({n, args.heads}, dtype);
  sum_into(partials, chunks, n * args.heads, acc, dtable);
  return dtable;
}

}  // namespace
}  // namespace udl

STABLE_TORCH_LIBRARY_IMPL(udlkernels, CPU, m) {
  m.impl("relative_position_bias_fwd", TORCH_BOX(&udl::relative_position_bias_fwd));
  m.impl("relative_position_bias_bwd", TORCH_BOX(&udl::relative_position_bias_bwd));
}
