# The Python extension modules: pybind11 classes. They link the C ABI library only.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 3 CONFIG REQUIRED)

file(GLOB binding_sources CONFIGURE_DEPENDS pyruntime/_ext/*.cpp)
pybind11_add_module(_native MODULE ${binding_sources})
target_link_libraries(_native PRIVATE pyruntime pyruntime_flags)
set_target_properties(_native PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
install(TARGETS _native LIBRARY DESTINATION pyruntime/_ext COMPONENT runtime)
