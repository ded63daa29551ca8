# The CUDA kernels on the CPU: tests that compile kernel sources with the C++ compiler and csrc/testing/cuda_emulator.
# No GPU and no nvcc is needed, but the headers of the CUDA toolkit are (vector types, __half, __nv_bfloat16).
#
#   CUDA_INCLUDE_DIR    the folder or folders that have them. When empty they are searched for: in $CUDA_HOME and
#                       $CUDA_PATH, beside nvcc, and among Python's packages (nvidia-cuda-runtime, nvidia-cuda-crt and
#                       nvidia-cuda-cccl have all that is needed).
set(CUDA_INCLUDE_DIR "" CACHE STRING "Folders with the headers of the CUDA toolkit; searched for when empty")

# nvcc on PATH may be a script or a link: the compiler itself says where its toolkit is.
function(find_toolkit_of_nvcc result)
  find_program(NVCC nvcc)
  mark_as_advanced(NVCC)
  set(${result} "" PARENT_SCOPE)
  if(NVCC)
    execute_process(COMMAND ${NVCC} --dryrun -E -x cu /dev/null OUTPUT_QUIET ERROR_VARIABLE dry_run)
    if(dry_run MATCHES "TOP=([^\r\n]+)")
      get_filename_component(toolkit "${CMAKE_MATCH_1}" REALPATH)
      set(${result} ${toolkit} PARENT_SCOPE)
    endif()
  endif()
endfunction()

# The include folders of Python's nvidia packages; their layout differs between CUDA 12 (one folder a package) and 13.
function(find_python_cuda_includes result)
  set(program [[
import glob, importlib.util
spec = importlib.util.find_spec("nvidia")
for root in spec.submodule_search_locations if spec else []:
    for path in sorted(glob.glob(root + "/*/include")):
        print(path, end=";")
]])
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${program}" OUTPUT_VARIABLE folders ERROR_QUIET)
  set(${result} "${folders}" PARENT_SCOPE)
endfunction()

# result <- the include folders, or empty and one status line.
function(find_cuda_headers result)
  if(CUDA_INCLUDE_DIR)
    set(candidates ${CUDA_INCLUDE_DIR})
  else()
    find_toolkit_of_nvcc(toolkit)
    find_python_cuda_includes(python_folders)
    foreach(root $ENV{CUDA_HOME} $ENV{CUDA_PATH} ${toolkit})
      list(APPEND candidates ${root}/include ${root}/targets/x86_64-linux/include)
    endforeach()
    list(APPEND candidates ${python_folders})
  endif()
  set(folders "")
  foreach(header cuda_fp16.h crt/host_defines.h nv/target)
    set(found "")
    foreach(folder ${candidates})
      foreach(place ${folder} ${folder}/cccl)
        if(NOT found AND EXISTS ${place}/${header})
          set(found ${place})
        endif()
      endforeach()
    endforeach()
    if(NOT found)
      message(STATUS "CUDA kernel tests: skipped, ${header} of the CUDA toolkit not found (set CUDA_INCLUDE_DIR)")
      set(${result} "" PARENT_SCOPE)
      return()
    endif()
    list(APPEND folders ${found})
  endforeach()
  list(REMOVE_DUPLICATES folders)
  set(${result} "${folders}" PARENT_SCOPE)
endfunction()

set(EMULATOR_BUILDS plain thread address)
set(EMULATOR_FLAGS_plain -O1)  # compiles in two thirds of the time of -O2 and runs a tenth longer
set(EMULATOR_FLAGS_thread -O1 -g1 -fsanitize=thread)
set(EMULATOR_FLAGS_address -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined)

# Builds `source` three times, as NAME_plain, NAME_thread and NAME_address.
function(add_emulator_executables name source)
  find_package(Threads REQUIRED)
  foreach(build ${EMULATOR_BUILDS})
    add_executable(${name}_${build} ${source})
    target_link_libraries(${name}_${build} PRIVATE kernels Threads::Threads)
    target_include_directories(${name}_${build} SYSTEM PRIVATE ${cuda_headers})
    # "#pragma unroll" is for nvcc alone.
    target_compile_options(${name}_${build} PRIVATE ${EMULATOR_FLAGS_${build}} -Wno-unknown-pragmas)
    target_link_options(${name}_${build} PRIVATE ${EMULATOR_FLAGS_${build}})
  endforeach()
endfunction()

# Adds a test of each build: TEST_BUILD runs NAME_BUILD with the arguments that follow. The limit is for a kernel that
# polls without ever letting another thread run.
function(add_emulator_tests test name)
  foreach(build ${EMULATOR_BUILDS})
    add_test(NAME ${test}_${build} COMMAND ${name}_${build} ${ARGN})
    set_tests_properties(${test}_${build} PROPERTIES TIMEOUT 600)
    if(NOT build STREQUAL plain)
      set_tests_properties(${test}_${build} PROPERTIES LABELS exhaustive)
    endif()
  endforeach()
  add_dependencies(quick_tests ${name}_plain)
endfunction()

set(cuda_headers "")
if(CMAKE_SYSTEM_NAME STREQUAL Linux AND CMAKE_SYSTEM_PROCESSOR STREQUAL x86_64 AND CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  find_cuda_headers(cuda_headers)
else()
  message(STATUS "CUDA kernel tests: skipped, the emulator needs GCC on x86-64 Linux")
endif()

if(cuda_headers)
  message(STATUS "CUDA kernel tests: headers from ${cuda_headers}")
  set(testing ${PROJECT_SOURCE_DIR}/csrc/testing)
  add_emulator_executables(cuda_emulator_test ${testing}/cuda_emulator_test.cpp)
  add_emulator_tests(cuda_emulator cuda_emulator_test)
  add_emulator_tests(cuda_emulator_faults cuda_emulator_test --faults)

  add_emulator_executables(cuda_kernel_test ${testing}/cuda_kernel_test.cpp)
  add_emulator_tests(cuda_kernels cuda_kernel_test)
  add_test(NAME cuda_kernels_sweep COMMAND cuda_kernel_test_plain --sweep)
  set_tests_properties(cuda_kernels_sweep PROPERTIES TIMEOUT 600 LABELS exhaustive)

  add_emulator_executables(td_lambda_test ${testing}/td_lambda_test.cpp)
  add_emulator_tests(cuda_td_lambda td_lambda_test)

  add_emulator_executables(categorical_test ${testing}/categorical_test.cpp)
  add_emulator_tests(cuda_categorical categorical_test)

  # The net is tested too; `cmake --build BUILD --target planted_bugs_page` writes the page that it is compared with.
  add_emulator_executables(planted_bugs_test ${testing}/planted_bugs_test.cpp)
  set(planted_bugs ${Python_EXECUTABLE} ${testing}/planted_bugs.py ${PROJECT_SOURCE_DIR}/docs/planted_bugs.md)
  foreach(build ${EMULATOR_BUILDS})
    list(APPEND planted_bugs ${build}=$<TARGET_FILE:planted_bugs_test_${build}>)
  endforeach()
  add_test(NAME planted_bugs COMMAND ${planted_bugs})
  set_tests_properties(planted_bugs PROPERTIES TIMEOUT 600 LABELS exhaustive)
  add_custom_target(planted_bugs_page COMMAND ${planted_bugs} --write VERBATIM)

  # The Python module that tests/ops/test_emulated_kernels.py builds: cmake --build BUILD --target emulated_kernels
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import pybind11; print(pybind11.get_include(), end='')"
    OUTPUT_VARIABLE pybind11_include RESULT_VARIABLE pybind11_missing ERROR_QUIET)
  find_package(Python 3.10 COMPONENTS Interpreter Development.Module QUIET)
  if(pybind11_missing OR NOT Python_Development.Module_FOUND)
    message(STATUS "emulated_kernels: skipped, it needs pybind11 and Python's headers")
  else()
    Python_add_library(emulated_kernels MODULE EXCLUDE_FROM_ALL ${testing}/emulated_kernels.cpp)
    target_link_libraries(emulated_kernels PRIVATE kernels Threads::Threads)
    target_include_directories(emulated_kernels SYSTEM PRIVATE ${cuda_headers} ${pybind11_include})
    target_compile_options(emulated_kernels PRIVATE ${EMULATOR_FLAGS_plain} -Wno-unknown-pragmas)
  endif()
endif()
