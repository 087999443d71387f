// The comparator of sorting networks. Included once per instruction set by kernels.cpp, inside a
// namespace of its own and a target region, which decides how wide the compiler makes the loop.

template <typename Key>
FEDCORE_INLINE void exchange_keys(Key* __restrict low, Key* __restrict high, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const Key a = low[i], b = high[i];
    low[i] = b < a ? b : a;
    high[i] = b < a ? a : b;
  }
}

void exchange_16(std::int16_t* low, std::int16_t* high, std::size_t count) {
  exchange_keys(low, high, count);
}

void exchange_32(std::int32_t* low, std::int32_t* high, std::size_t count) {
  exchange_keys(low, high, count);
}

void exchange_64(std::int64_t* low, std::int64_t* high, std::size_t count) {
  exchange_keys(low, high, count);
}
