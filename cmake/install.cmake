# Installed layout, the same in a wheel, an editable tree and a plain prefix.
include(CMakePackageConfigHelpers)
set(libdir pyruntime/lib)
install(TARGETS pyruntime EXPORT pyruntimeTargets LIBRARY DESTINATION ${libdir} COMPONENT runtime)
install(DIRECTORY csrc/include/pyruntime DESTINATION pyruntime/include COMPONENT runtime)
install(EXPORT pyruntimeTargets NAMESPACE pyruntime:: DESTINATION ${libdir}/cmake/pyruntime COMPONENT runtime)
configure_package_config_file(cmake/pyruntimeConfig.cmake.in ${CMAKE_BINARY_DIR}/pyruntimeConfig.cmake
                              INSTALL_DESTINATION ${libdir}/cmake/pyruntime)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/pyruntimeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(cmake/pyruntime.pc.in ${CMAKE_BINARY_DIR}/pyruntime.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/pyruntimeConfig.cmake ${CMAKE_BINARY_DIR}/pyruntimeConfigVersion.cmake
        DESTINATION ${libdir}/cmake/pyruntime COMPONENT runtime)
install(FILES ${CMAKE_BINARY_DIR}/pyruntime.pc DESTINATION ${libdir}/pkgconfig COMPONENT runtime)
