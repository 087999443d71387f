// All loops of the kernels' table; see levels.inl.
#include "kernels/kernels.inl"

#include "kernels/differences.inl"

#include "kernels/codes.inl"

#include "kernels/exchange_keys.inl"
