// The loops of finishers. Included once per instruction set by finish_bodies.cpp, inside a namespace of
// its own and a target region. Only plain functions of this file, the always inlined ones of arith.hpp
// and builtins are called here, so that no function of the library is compiled for the wrong target.

// --- The kinds, by vectors ---
//
// The compiler's own vector types, as wide as this level's registers or wider. Every operation is the IEEE
// one of its lanes, so no level differs in a bit, and neither do the last elements of a piece, one by one.

typedef double Vd __attribute__((vector_size(8 * FEDCORE_LANES)));
typedef float Vf __attribute__((vector_size(4 * FEDCORE_LANES)));

// A number as it is kept in a state of this word. V is double or Vd, here and below.
template <typename Word, typename V>
FEDCORE_HD V kept(V value) {
  constexpr bool narrow = sizeof(Word) == sizeof(float);
  const V largest = V{} + (narrow ? arith::F32::largest() : arith::F64::largest());
  value = value > largest ? largest : value;
  value = value < -largest ? -largest : value;
  if constexpr (narrow && sizeof(V) == sizeof(double)) {
    value = static_cast<float>(value);
  } else if constexpr (narrow) {
    value = __builtin_convertvector(__builtin_convertvector(value, Vf), Vd);
  }
  return value;
}

template <typename V>
FEDCORE_HD V root(V value) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return __builtin_sqrt(value);
  } else {
    V roots;
    for (std::size_t lane = 0; lane < FEDCORE_LANES; ++lane) {
      roots[lane] = __builtin_sqrt(value[lane]);
    }
    return roots;
  }
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
    return __builtin_convertvector(value, V);
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

// One element, or a vector of them, from the i-th on; without states yet, from those it starts with.
// kDirect: from the model to the model.
template <typename Kind, typename V, bool kFresh, bool kDirect, typename Word>
FEDCORE_HD void next(const double* options, const double* start, const FinishPiece<Word>& piece,
                     std::size_t i) {
  constexpr std::size_t kStates = sizeof Kind::kStates / sizeof Kind::kStates[0];
  [[maybe_unused]] constexpr std::size_t kElements =
      sizeof(V) == sizeof(double) ? 1 : FEDCORE_LANES;
  V state[kStates], x, step;
  if constexpr (kDirect) {
    const char* const base = static_cast<const char*>(piece.base) + i * sizeof(float);
    float elements[kElements];
    __builtin_memcpy(elements, base, sizeof elements);
    ask_for(base);
    x = load<V>(elements);
    step = load<V>(piece.combined + i) - x;
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
  if constexpr (kDirect) {
    float elements[kElements];
    store(elements, kept<float>(x));
    __builtin_memcpy(static_cast<char*>(piece.out) + i * sizeof(float), elements, sizeof elements);
  } else {
    store(piece.x + i, x);
  }
}

template <typename Kind, bool kFresh, bool kDirect, typename Word>
FEDCORE_HD void run(const double* given, const FinishPiece<Word>& piece) {
  constexpr std::size_t kStates = sizeof Kind::kStates / sizeof Kind::kStates[0];
  double options[sizeof Kind::kOptions / sizeof Kind::kOptions[0]], start[kStates];
  __builtin_memcpy(options, given, sizeof options);
  for (std::size_t s = 0; s < kStates; ++s) {
    start[s] = kept<Word>(Kind::start(options, s));
  }
  const std::size_t whole = piece.n / FEDCORE_LANES * FEDCORE_LANES;
  for (std::size_t i = 0; i < whole; i += FEDCORE_LANES) {
    next<Kind, Vd, kFresh, kDirect>(options, start, piece, i);
  }
  for (std::size_t i = whole; i < piece.n; ++i) {
    next<Kind, double, kFresh, kDirect>(options, start, piece, i);
  }
}

template <typename Kind, typename Word>
void finish(const double* options, const FinishPiece<Word>& piece) {
  if (piece.before != nullptr) {
    run<Kind, false, false>(options, piece);
  } else {
    run<Kind, true, false>(options, piece);
  }
}

template <typename Kind, typename Word>
void finish_direct(const double* options, const FinishPiece<Word>& piece) {
  if (piece.before != nullptr) {
    run<Kind, false, true>(options, piece);
  } else {
    run<Kind, true, true>(options, piece);
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
