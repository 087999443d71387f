// The loops of finishers. Included once per instruction set by finish_bodies.cpp, inside a namespace of
// its own and a target region. Only plain functions of this file, the always inlined ones of arith.hpp
// and builtins are called here, so that no function of the library is compiled for the wrong target.

// --- The kinds, by vectors ---
//
// The compiler's own vector types, as wide as this level's registers or wider. Every operation is the IEEE
// one of its lanes, so no level differs in a bit, and neither do the last elements of a piece, one by one.

typedef double Vd __attribute__((vector_size(8 * FEDCORE_LANES)));
typedef float Vf __attribute__((vector_size(4 * FEDCORE_LANES)));
typedef std::uint32_t Vu __attribute__((vector_size(4 * FEDCORE_LANES)));
typedef std::uint16_t Vh __attribute__((vector_size(2 * FEDCORE_LANES)));

#if FEDCORE_LANES == 8
// GCC 12 takes the forms without a mask for ones that read what was never set.
constexpr __mmask8 kEach = 0xFF;
#endif

// In one operation; the compiler converts a register's halves and joins them.
FEDCORE_HD Vd widened(Vf value) {
#if FEDCORE_LANES == 8
  return _mm512_maskz_cvtps_pd(kEach, value);
#elif FEDCORE_F16C
  return _mm256_cvtps_pd(value);
#else
  return __builtin_convertvector(value, Vd);
#endif
}

FEDCORE_HD Vu widened_words(const void* from) {
#if FEDCORE_LANES == 8
  return reinterpret_cast<Vu>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#elif FEDCORE_F16C
  return reinterpret_cast<Vu>(
      _mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  Vh words;
  __builtin_memcpy(&words, from, sizeof words);
  return __builtin_convertvector(words, Vu);
#endif
}

// Limited to [-largest, largest]; NaN stays. The compiler makes comparisons and blends of the choices,
// which the processors do in one operation.
FEDCORE_HD double limit(double value, double largest) {
  value = value > largest ? largest : value;
  return value < -largest ? -largest : value;
}

FEDCORE_HD Vd limit(Vd value, Vd largest) {
#if FEDCORE_LANES == 8
  return _mm512_maskz_max_pd(kEach, -largest, _mm512_maskz_min_pd(kEach, largest, value));
#elif FEDCORE_F16C
  return _mm256_max_pd(-largest, _mm256_min_pd(largest, value));
#else
  value = value > largest ? largest : value;
  return value < -largest ? -largest : value;
#endif
}

FEDCORE_HD Vf limit(Vf value, Vf largest) {
#if FEDCORE_LANES == 8
  return _mm256_max_ps(-largest, _mm256_min_ps(largest, value));
#elif FEDCORE_F16C
  return _mm_max_ps(-largest, _mm_min_ps(largest, value));
#else
  value = value > largest ? largest : value;
  return value < -largest ? -largest : value;
#endif
}

// A number as it is kept in a state of this word. V is double or Vd, here and below.
template <typename Word, typename V>
FEDCORE_HD V kept(V value) {
  constexpr bool narrow = sizeof(Word) == sizeof(float);
  value = limit(value, V{} + (narrow ? arith::F32::largest() : arith::F64::largest()));
  if constexpr (narrow && sizeof(V) == sizeof(double)) {
    value = static_cast<float>(value);
  } else if constexpr (narrow) {
    value = widened(__builtin_convertvector(value, Vf));
  }
  return value;
}

FEDCORE_HD double root(double value) { return __builtin_sqrt(value); }

FEDCORE_HD Vd root(Vd value) {
#if FEDCORE_LANES == 8
  return _mm512_maskz_sqrt_pd(kEach, value);
#elif FEDCORE_F16C
  return _mm256_sqrt_pd(value);
#else
  Vd roots;
  for (std::size_t lane = 0; lane < FEDCORE_LANES; ++lane) {
    roots[lane] = __builtin_sqrt(value[lane]);
  }
  return roots;
#endif
}

#include "reduce/finishers.inl"

template <typename V, typename Word>
FEDCORE_HD V load(const Word* from) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return *from;
  } else if constexpr (sizeof(Word) == sizeof(double)) {
    V value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  } else {
    Vf value;
    __builtin_memcpy(&value, from, sizeof value);
    return widened(value);
  }
}

template <typename V, typename Word>
FEDCORE_HD void store(Word* to, V value) {
  if constexpr (sizeof(V) == sizeof(double)) {
    *to = static_cast<Word>(value);
  } else if constexpr (sizeof(Word) == sizeof(double)) {
    __builtin_memcpy(to, &value, sizeof value);
  } else {
    const Vf narrow = __builtin_convertvector(value, Vf);
    __builtin_memcpy(to, &narrow, sizeof narrow);
  }
}

// What is a piece ahead is asked for: the prefetcher of the processor stops at the end of each page, and
// passes over the inputs come in between. At the baseline the arithmetic takes longer than the bytes.
FEDCORE_HD void ask_for([[maybe_unused]] const void* place) {
#if FEDCORE_F16C
  __builtin_prefetch(static_cast<const char*>(place) + kAhead);
#endif
}

template <typename V>
constexpr std::size_t kElements = sizeof(V) == sizeof(double) ? 1 : FEDCORE_LANES;

// How a piece gets its elements and gives them back: those of binary64 that other loops have made of
// them, or straight from the model to the model, of F32, or of BF16 with a master behind the states.
struct Widened {
  static constexpr bool kDirect = false, kMaster = false;
};

struct DirectF32 {
  static constexpr bool kDirect = true, kMaster = false;
  static constexpr std::size_t kWidth = sizeof(float);
  template <typename V>
  static FEDCORE_HD V read(const char* from) {
    float elements[kElements<V>];
    __builtin_memcpy(elements, from, sizeof elements);
    return load<V>(elements);
  }
  template <typename V>
  static FEDCORE_HD void write(char* to, V x) {
    float elements[kElements<V>];
    store(elements, x);
    __builtin_memcpy(to, elements, sizeof elements);
  }
};

// What is written is a number of binary32, limited and rounded to nearest, ties to even.
struct DirectBf16 {
  static constexpr bool kDirect = true, kMaster = true;
  static constexpr std::size_t kWidth = sizeof(std::uint16_t);
  template <typename V>
  static FEDCORE_HD V read(const char* from) {
    if constexpr (sizeof(V) == sizeof(double)) {
      std::uint16_t word;
      __builtin_memcpy(&word, from, sizeof word);
      return arith::Bf16::decode(word);
    } else {
      const Vu bits = widened_words(from) << 16;
      Vf elements;
      __builtin_memcpy(&elements, &bits, sizeof bits);
      return widened(elements);
    }
  }
  template <typename V>
  static FEDCORE_HD void write(char* to, V x) {
    if constexpr (sizeof(V) == sizeof(double)) {
      const std::uint16_t word = arith::Bf16::encode(arith::limited<arith::Bf16>(x));
      __builtin_memcpy(to, &word, sizeof word);
    } else {
      const Vf largest = Vf{} + static_cast<float>(arith::Bf16::largest());
      const Vf elements = limit(__builtin_convertvector(x, Vf), largest);
      Vu bits;
      __builtin_memcpy(&bits, &elements, sizeof bits);
      bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      const Vh words = __builtin_convertvector(bits, Vh);
      __builtin_memcpy(to, &words, sizeof words);
    }
  }
};

// One element, or a vector of them, from the i-th on; without states yet, from those it starts with.
template <typename Kind, typename V, bool kFresh, typename Format, typename Word>
FEDCORE_HD void next(const double* options, const double* start, const FinishPiece<Word>& piece,
                     std::size_t i) {
  constexpr std::size_t kStates = sizeof Kind::kStates / sizeof Kind::kStates[0];
  V state[kStates], x, step;
  if constexpr (Format::kDirect) {
    const char* const base = static_cast<const char*>(piece.base) + i * Format::kWidth;
    ask_for(base);
    x = Format::template read<V>(base);
    step = load<V>(piece.combined + i) - x;
    if constexpr (Format::kMaster && !kFresh) {
      x = load<V>(piece.before[kStates] + i);
      ask_for(piece.before[kStates] + i);
    }
  } else {
    x = load<V>(piece.x + i);
    step = load<V>(piece.step + i);
  }
  for (std::size_t s = 0; s < kStates; ++s) {
    if constexpr (kFresh) {
      state[s] = V{} + start[s];
    } else {
      state[s] = load<V>(piece.before[s] + i);
      ask_for(piece.before[s] + i);
    }
  }
  Kind::template next<Word>(options, step, x, state);
  for (std::size_t s = 0; s < kStates; ++s) {
    store(piece.after[s] + i, state[s]);
  }
  if constexpr (Format::kDirect) {
    x = kept<float>(x);
    if constexpr (Format::kMaster) {
      store(piece.after[kStates] + i, x);
    }
    Format::write(static_cast<char*>(piece.out) + i * Format::kWidth, x);
  } else {
    store(piece.x + i, x);
  }
}

template <typename Kind, bool kFresh, typename Format, typename Word>
FEDCORE_HD void run(const double* given, FinishPiece<Word> piece) {
  constexpr std::size_t kStates = sizeof Kind::kStates / sizeof Kind::kStates[0];
  constexpr std::size_t kPlaces = kStates + (Format::kMaster ? 1 : 0);
  // Copies, which no store of an element can change: they stay in registers.
  const Word* before[kPlaces];
  Word* after[kPlaces];
  for (std::size_t s = 0; s < kPlaces; ++s) {
    before[s] = kFresh ? nullptr : piece.before[s];
    after[s] = piece.after[s];
  }
  piece.before = before;
  piece.after = after;
  double options[sizeof Kind::kOptions / sizeof Kind::kOptions[0]], start[kStates];
  __builtin_memcpy(options, given, sizeof options);
  for (std::size_t s = 0; s < kStates; ++s) {
    start[s] = kept<Word>(Kind::start(options, s));
  }
  const std::size_t whole = piece.n / FEDCORE_LANES * FEDCORE_LANES;
  for (std::size_t i = 0; i < whole; i += FEDCORE_LANES) {
    next<Kind, Vd, kFresh, Format>(options, start, piece, i);
  }
  for (std::size_t i = whole; i < piece.n; ++i) {
    next<Kind, double, kFresh, Format>(options, start, piece, i);
  }
}

template <typename Kind, typename Word>
void finish(const double* options, const FinishPiece<Word>& piece) {
  if (piece.before != nullptr) {
    run<Kind, false, Widened>(options, piece);
  } else {
    run<Kind, true, Widened>(options, piece);
  }
}

template <typename Kind, typename Format, typename Word>
void finish_direct(const double* options, const FinishPiece<Word>& piece) {
  if (piece.before != nullptr) {
    run<Kind, false, Format>(options, piece);
  } else {
    run<Kind, true, Format>(options, piece);
  }
}

// --- Elements as they are in a model, and a master ---

// Those of a model have no alignment.
struct F64 : arith::F64 {
  typedef UnalignedU64 Word;
};
struct F32 : arith::F32 {
  typedef UnalignedU32 Word;
};
struct F16 : arith::F16 {
  typedef UnalignedU16 Word;
};
struct Bf16 : arith::Bf16 {
  typedef UnalignedU16 Word;
};

template <typename Format>
void widen(const void* base, const double* combined, double* x, double* step, std::size_t n) {
  const auto* words = static_cast<const typename Format::Word*>(base);
  FEDCORE_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) {
    x[i] = Format::decode(words[i]);
    step[i] = combined[i] - x[i];
  }
}

template <typename Format>
void round(const double* x, void* out, std::size_t n) {
  auto* words = static_cast<typename Format::Word*>(out);
  FEDCORE_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) {
    words[i] = Format::encode(arith::limited<Format>(x[i]));
  }
}

void load_master(const float* from, double* x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    x[i] = from[i];
  }
}

void keep_master(double* x, float* to, std::size_t n) {
  FEDCORE_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) {
    x[i] = kept<float>(x[i]);
    to[i] = static_cast<float>(x[i]);
  }
}

template <typename Word>
void average(double decay, const Word* before, const double* x, Word* after, std::size_t n) {
  FEDCORE_INDEPENDENT
  for (std::size_t i = 0; i < n; ++i) {
    after[i] = static_cast<Word>(
        kept<Word>(decay * static_cast<double>(before[i]) + (1 - decay) * kept<Word>(x[i])));
  }
}

constexpr FinishStages kStages = {
    {&widen<F64>, &widen<F32>, &widen<F16>, &widen<Bf16>},
    {&round<F64>, &round<F32>, &round<F16>, &round<Bf16>},
    &load_master,
    &keep_master,
    &average<float>,
    &average<double>,
};
