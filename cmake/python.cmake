# The Python extension modules: pybind11 for classes, Cython for the hot path, cffi for those who
# want the plain C functions. They link the C ABI library only.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 3 CONFIG REQUIRED)

file(GLOB binding_sources CONFIGURE_DEPENDS pyruntime/_ext/*.cpp)
pybind11_add_module(_native MODULE ${binding_sources})
target_link_libraries(_native PRIVATE pyruntime pyruntime_flags)

file(GLOB pxd CONFIGURE_DEPENDS pyruntime/_ext/*.pxd)
foreach(module _fast _kv)
  set(c ${CMAKE_BINARY_DIR}/${module}.c)
  add_custom_command(OUTPUT ${c} DEPENDS pyruntime/_ext/${module}.pyx ${pxd}
    COMMAND ${Python_EXECUTABLE} -m cython -3 --module-name pyruntime._ext.${module} -I ${PROJECT_SOURCE_DIR}
            ${PROJECT_SOURCE_DIR}/pyruntime/_ext/${module}.pyx -o ${c})
  Python_add_library(${module} MODULE WITH_SOABI ${c})
endforeach()

set(cffi_c ${CMAKE_BINARY_DIR}/_cffi.c)
file(GLOB headers CONFIGURE_DEPENDS csrc/include/pyruntime/*.h)
add_custom_command(OUTPUT ${cffi_c} DEPENDS pyruntime/_ext/cffi_build.py ${headers}
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/pyruntime/_ext/cffi_build.py
          ${PROJECT_SOURCE_DIR}/csrc/include/pyruntime ${cffi_c})
Python_add_library(_cffi MODULE WITH_SOABI ${cffi_c})

foreach(module _fast _kv _cffi)
  target_link_libraries(${module} PRIVATE pyruntime)
  target_include_directories(${module} PRIVATE csrc/include)
endforeach()
set_target_properties(_native _fast _kv _cffi PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
install(TARGETS _native _fast _kv _cffi LIBRARY DESTINATION pyruntime/_ext COMPONENT runtime)
