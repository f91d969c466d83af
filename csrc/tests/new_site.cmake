# SPDX-License-Identifier: Apache-2.0
# An engine with sites added by the steps of docs/internals.md ("To add a site"), for new_site_test.c. Each site is a
# row of sites.inc and an announcement; some of them are wrong.
set(NEW_SITE ${CMAKE_BINARY_DIR}/new_site)
set(NEW_SITE_FROM csrc/gemma4.h csrc/model/sites.inc csrc/model/text/text.c)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${NEW_SITE_FROM})
foreach(file ${NEW_SITE_FROM})
  string(REPLACE csrc/ "" name ${file})
  configure_file(${file} ${NEW_SITE}/${name} COPYONLY)
endforeach()

function(add_after file line text) # fails if the line no longer exists
  file(READ ${NEW_SITE}/${file} old)
  string(REPLACE "${line}" "${line}${text}" new "${old}")
  if(new STREQUAL old)
    message(FATAL_ERROR "csrc/tests/new_site.cmake: ${file} has no ${line}")
  endif()
  file(WRITE ${NEW_SITE}/${file} "${new}")
endfunction()

file(APPEND ${NEW_SITE}/model/sites.inc "\n")
foreach(row "NEW_BEFORE|BEFORE|EDIT" "LIES_AFTER|AFTER|EDIT" "NEW_AFTER|AFTER|EDIT" "LIES_BEFORE|BEFORE|EDIT" "NEW_READ|AFTER|READ")
  string(REPLACE "|" ";" row ${row})
  list(GET row 0 id)
  list(GET row 1 rows)
  list(GET row 2 access)
  file(APPEND ${NEW_SITE}/model/sites.inc "G4_SITE(${id}, \"blocks.{}.${id}\", \"TD\", LAYER, ${rows}, NONE, F32, ${access})\n")
endforeach()
add_after(model/text/text.c "    TAP(RESID_PRE, layer, f->resid)" [[;
    TAP(NEW_BEFORE, layer, f->resid);
    TAP(LIES_AFTER, layer, f->resid)]])
add_after(model/text/text.c "    TAP(RESID_MID, layer, f->resid)" [[;
    TAP(NEW_AFTER, layer, f->resid);
    TAP(LIES_BEFORE, layer, f->resid);
    TAP(NEW_READ, layer, f->resid)]])

file(GLOB NEW_SITE_SOURCES CONFIGURE_DEPENDS csrc/model/*.c csrc/model/*/*.c)
list(FILTER NEW_SITE_SOURCES EXCLUDE REGEX "text/text.c$")
add_executable(new_site_test csrc/tests/new_site_test.c csrc/tests/fixture.c ${NEW_SITE}/model/text/text.c ${NEW_SITE_SOURCES})
target_include_directories(new_site_test BEFORE PRIVATE ${NEW_SITE} csrc)
target_compile_definitions(new_site_test PRIVATE _GNU_SOURCE)
target_link_libraries(new_site_test PRIVATE gemma4_static) # base, kernels and ops; the objects above come first
set_target_properties(new_site_test PROPERTIES BUILD_RPATH "${OPENBLAS_LIB_DIR}")
add_test(NAME new_site_test COMMAND new_site_test)
