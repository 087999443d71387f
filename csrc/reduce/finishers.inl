// All kinds of finishers. Each is defined in a source file of its own; a new one gets two lines here.
// The order is that of the documentation.
#include "reduce/adagrad.inl"
#include "reduce/adam.inl"
#include "reduce/momentum.inl"
#include "reduce/nesterov.inl"
#include "reduce/yogi.inl"

#undef FEDCORE_FINISHERS
#define FEDCORE_FINISHERS(DO) DO(Momentum) DO(Nesterov) DO(Adagrad) DO(Adam) DO(Yogi)
