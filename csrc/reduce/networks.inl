// The loops of networks. Included once per instruction set by networks.cpp, inside a namespace of its own
// and a target region. Only functions of this file, always inlined ones and builtins are called here, so
// that no function of the library is compiled for the wrong target.

#if FEDCORE_F16C

#if FEDCORE_LANES == 8
typedef __m512i Register;

// GCC 12 takes the forms without a mask for ones that read what was never set.
constexpr __mmask16 kEach = 0xFFFF;

template <typename Key>
FEDCORE_HD Register lesser(Register a, Register b) {
  return sizeof(Key) == 4 ? _mm512_maskz_min_epi32(kEach, a, b) : _mm512_min_epi16(a, b);
}

template <typename Key>
FEDCORE_HD Register greater(Register a, Register b) {
  return sizeof(Key) == 4 ? _mm512_maskz_max_epi32(kEach, a, b) : _mm512_max_epi16(a, b);
}

// As turned() in ranking.cpp, for each of the keys.
template <typename Key>
FEDCORE_HD Register turned(Register bits) {
  const Register sign =
      sizeof(Key) == 4 ? _mm512_maskz_srai_epi32(kEach, bits, 31) : _mm512_srai_epi16(bits, 15);
  const Register others =
      sizeof(Key) == 4 ? _mm512_set1_epi32(INT32_MAX) : _mm512_set1_epi16(INT16_MAX);
  return _mm512_ternarylogic_epi32(bits, sign, others, 0x78);  // bits ^ (sign & others)
}
#else
typedef __m256i Register;

template <typename Key>
FEDCORE_HD Register lesser(Register a, Register b) {
  return sizeof(Key) == 4 ? _mm256_min_epi32(a, b) : _mm256_min_epi16(a, b);
}

template <typename Key>
FEDCORE_HD Register greater(Register a, Register b) {
  return sizeof(Key) == 4 ? _mm256_max_epi32(a, b) : _mm256_max_epi16(a, b);
}

template <typename Key>
FEDCORE_HD Register turned(Register bits) {
  const Register sign =
      sizeof(Key) == 4 ? _mm256_srai_epi32(bits, 31) : _mm256_srai_epi16(bits, 15);
  const Register others =
      sizeof(Key) == 4 ? _mm256_set1_epi32(INT32_MAX) : _mm256_set1_epi16(INT16_MAX);
  return _mm256_xor_si256(bits, _mm256_and_si256(sign, others));
}
#endif

template <typename Key>
struct Extremes {
  Register least{}, most{};  // 0 is finite

  FEDCORE_HD void look_at(Register low, Register high) {
    least = lesser<Key>(least, low);
    most = greater<Key>(most, high);
  }

  // Whether all keys were those of finite numbers.
  FEDCORE_HD bool finite(Key exponent) const {
    Key low[sizeof least / sizeof(Key)], high[sizeof most / sizeof(Key)];
    __builtin_memcpy(low, &least, sizeof low);
    __builtin_memcpy(high, &most, sizeof high);
    bool all = true;
    for (std::size_t i = 0; i < sizeof least / sizeof(Key); ++i) {
      all = all && high[i] < exponent && low[i] > static_cast<Key>(~exponent);
    }
    return all;
  }
};

template <typename Key, std::size_t kSource>
FEDCORE_HD void read(Register* rows, const std::uint8_t* const* from, std::size_t at) {
  const std::uint8_t* const bytes = from[kSource] + at;
  for (std::size_t line = 0; line < sizeof(Register); line += kLine) {
    __builtin_prefetch(bytes + kAhead + line);
  }
  Register bits;
  __builtin_memcpy(&bits, bytes, sizeof bits);
  rows[kSource] = turned<Key>(bits);
}

template <typename Key, std::size_t kLow, std::size_t kHigh>
FEDCORE_HD void exchange(Register* rows) {
  const Register low = rows[kLow], high = rows[kHigh];
  rows[kLow] = lesser<Key>(low, high);
  rows[kHigh] = greater<Key>(low, high);
}

template <typename Key, std::size_t kRank>
FEDCORE_HD void write(const Register* rows, const NetworkPiece& piece, std::size_t at) {
  if (kRank >= piece.first && kRank <= piece.last) {
    const Register bits = turned<Key>(rows[kRank]);
    __builtin_memcpy(piece.rows + kRank * piece.stride + at, &bits, sizeof bits);
  }
}

template <typename Key, std::size_t k, std::size_t kFrom, std::size_t... kAt>
FEDCORE_HD void exchange_all([[maybe_unused]] Register* rows, std::index_sequence<kAt...>) {
  (exchange<Key, kNetwork<k>.low[kFrom + kAt], kNetwork<k>.high[kFrom + kAt]>(rows), ...);
}

// One vector of each source, from byte `at` on in `from` and from byte `to` on in the rows.
template <typename Key, bool kMiddle, std::size_t... kSource>
FEDCORE_HD void rank(const std::uint8_t* const* from, std::size_t at, const NetworkPiece& piece,
                     std::size_t to, Extremes<Key>& extremes, std::index_sequence<kSource...>) {
  constexpr std::size_t k = sizeof...(kSource);
  constexpr std::size_t kHalves = kNetwork<k>.halves, kAll = kNetwork<k>.all;
  constexpr std::size_t kSecond = std::bit_ceil(k) / 2;  // where the second half begins
  Register rows[k];
  (read<Key, kSource>(rows, from, at), ...);
  exchange_all<Key, k, 0>(rows, std::make_index_sequence<kHalves>());
  extremes.look_at(rows[0], rows[kSecond - 1]);
  extremes.look_at(rows[kSecond], rows[k - 1]);
  exchange_all<Key, k, kHalves>(rows, std::make_index_sequence<kAll - kHalves>());
  if constexpr (kMiddle) {
    write<Key, (k - 1) / 2>(rows, piece, to);
    if constexpr (k % 2 == 0) {
      write<Key, k / 2>(rows, piece, to);
    }
  } else {
    (write<Key, kSource>(rows, piece, to), ...);
  }
}

template <typename Key, std::size_t k, bool kMiddle>
bool rank_piece(const NetworkPiece& piece, std::int64_t exponent) {
  constexpr auto kSources = std::make_index_sequence<k>();
  constexpr std::size_t kWidth = sizeof(Register);
  const std::uint8_t* from[k];
  for (std::size_t s = 0; s < k; ++s) {
    from[s] = static_cast<const std::uint8_t*>(piece.inputs[s]) + piece.at * sizeof(Key);
  }
  std::uint8_t rest[k][kWidth] = {};
  const std::size_t nbytes = piece.count * sizeof(Key);
  Extremes<Key> extremes;
  for (std::size_t to = 0; to < nbytes; to += kWidth) {
    std::size_t at = to;
    if (nbytes - to < kWidth) {
      for (std::size_t s = 0; s < k; ++s) {
        __builtin_memcpy(rest[s], from[s] + to, nbytes - to);
        from[s] = rest[s];
      }
      at = 0;
    }
    rank<Key, kMiddle>(from, at, piece, to, extremes, kSources);
  }
  return extremes.finite(static_cast<Key>(exponent));
}

template <typename Key, bool kMiddle, std::size_t... kMore>
constexpr NetworksOf networks_of(std::index_sequence<kMore...>) {
  return {{&rank_piece<Key, kLeastInRegisters + kMore, kMiddle>...}};
}

constexpr auto kNumbers = std::make_index_sequence<kMostInRegisters - kLeastInRegisters + 1>();
constexpr Networks kNetworks = {
    {networks_of<std::int16_t, false>(kNumbers), networks_of<std::int16_t, true>(kNumbers)},
    {networks_of<std::int32_t, false>(kNumbers), networks_of<std::int32_t, true>(kNumbers)}};

#else
constexpr Networks kNetworks = {};
#endif
