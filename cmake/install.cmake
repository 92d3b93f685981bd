# Installed layout, the same in a wheel, an editable tree and a plain prefix.
include(CMakePackageConfigHelpers)
set(libdir pyruntime/lib)
install(TARGETS pyruntime EXPORT pyruntimeTargets LIBRARY DESTINATION ${libdir} COMPONENT runtime)
install(DIRECTORY csrc/include/pyruntime DESTINATION pyruntime/include COMPONENT runtime)
# What kernels of users include (cuda/filter/device_functions.cuh), under the paths of this tree.
foreach(header csrc/base/hash.hpp csrc/base/integers.hpp csrc/filter/layout.hpp csrc/filter/core.hpp
        cuda/include/atomic.cuh cuda/include/device.cuh cuda/filter/device_functions.cuh)
  cmake_path(GET header PARENT_PATH folder)
  string(REGEX REPLACE "^csrc/" "" folder ${folder})
  install(FILES ${header} DESTINATION pyruntime/include/pyruntime/device/${folder} COMPONENT runtime)
endforeach()
install(EXPORT pyruntimeTargets NAMESPACE pyruntime:: DESTINATION ${libdir}/cmake/pyruntime COMPONENT runtime)
configure_package_config_file(cmake/pyruntimeConfig.cmake.in ${CMAKE_BINARY_DIR}/pyruntimeConfig.cmake
                              INSTALL_DESTINATION ${libdir}/cmake/pyruntime)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/pyruntimeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(cmake/pyruntime.pc.in ${CMAKE_BINARY_DIR}/pyruntime.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/pyruntimeConfig.cmake ${CMAKE_BINARY_DIR}/pyruntimeConfigVersion.cmake
        DESTINATION ${libdir}/cmake/pyruntime COMPONENT runtime)
install(FILES ${CMAKE_BINARY_DIR}/pyruntime.pc DESTINATION ${libdir}/pkgconfig COMPONENT runtime)
