# Sets FEDCORE_HAS_CUDA. FEDCORE_CUDA=AUTO never fails: no nvcc, a broken one, one that refuses the host compiler
# only leaves the module out. So nvcc is tried outside this project first, where an error ends nothing.
set(FEDCORE_HAS_CUDA OFF)
if(FEDCORE_CUDA STREQUAL "OFF" OR (FEDCORE_CUDA STREQUAL "AUTO" AND FEDCORE_SANITIZE))
  return()
endif()
# The bits of the CPU: no contraction of w * x + y, IEEE division, subnormals kept.
set(FEDCORE_CUDA_FLAGS -fmad=false -prec-div=true -prec-sqrt=true -ftz=false)

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  execute_process(
    COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 ${FEDCORE_CUDA_FLAGS} -I${PROJECT_SOURCE_DIR}/csrc
      -ptx ${PROJECT_SOURCE_DIR}/csrc/cuda/reduce.cu -o ${PROJECT_BINARY_DIR}/cuda_reduce.ptx
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch
    RESULT_VARIABLE listed OUTPUT_VARIABLE known ERROR_QUIET)
  if(status EQUAL 0 AND listed EQUAL 0 AND known MATCHES "compute_([0-9]+)")
    set(FEDCORE_HAS_CUDA ON)
  else()
    string(PREPEND output "${CMAKE_CUDA_COMPILER} can't compile csrc/cuda/reduce.cu: ")
  endif()
else()
  set(output "no nvcc that works was found")
endif()
if(NOT FEDCORE_HAS_CUDA)
  if(FEDCORE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FEDCORE_CUDA=ON, but ${output}")
  endif()
  message(STATUS "fedcore is built without CUDA: ${output}")
  return()
endif()

# Machine code for the A100 and the H100; the oldest virtual architecture is for all others: the driver translates it.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1}-virtual)
  foreach(real 80 90)
    if(known MATCHES "compute_${real}\n")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${real}-real)
    endif()
  endforeach()
endif()
