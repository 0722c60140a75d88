"""What pyproject.toml cannot say: the two compiled modules, and where kernels/ goes.

`sdattn_fast._core` is for CPUs, one translation unit per instruction set, and built where there is a C++ compiler
(SDATTN_FAST_CPU=1: or else fail; =0: never); `sdattn_fast._cuda` is built where nvcc is found too (SDATTN_FAST_CUDA, in
the same way), for TORCH_CUDA_ARCH_LIST. Without them the package is Python alone, and `sdattn-fast doctor` says what is
missing. What one build compiled, the next one finds in build/: an editable install, then a wheel, compile once.

No torch at build time, so build isolation works, and Python's limited API: one wheel serves every torch, and every
CPython from 3.10 on. OpenMP is used where the compiler has it; at run time the core is loaded after torch and shares
torch's own libgomp and its threads.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# The folder kernels/ beside this file must not hide PyPI's package of that name from anything the build imports.
ROOT = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import ninja  # noqa: E402
from ninja.ninja_syntax import Writer  # noqa: E402
from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.build import build  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402

sys.path.insert(0, str(ROOT / "csrc"))
import nvcc  # noqa: E402

CPU, CUDA = "csrc/cpu", "csrc/cuda"
CPU_SOURCES = [f"{CPU}/{name}.cpp" for name in ("bindings", "attention", "backward", "isa_portable")]
CUDA_SOURCES = [f"{CUDA}/bindings.cpp", *sorted(f"{CUDA}/{path.name}" for path in (ROOT / CUDA).glob("*.cu"))]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
FLAGS_OF = {}  # of one source, beside FLAGS
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=fast"]

if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    FLAGS_OF = {
        f"{CPU}/isa_avx2.cpp": ["-mavx2", "-mfma"],
        f"{CPU}/isa_avx512.cpp": AVX512,
        f"{CPU}/isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    }
    CPU_SOURCES += FLAGS_OF

# Relative paths throughout, and none of a build environment that pip makes anew each time: ninja compiles again what
# has another command. The C library is in the name, or a container would link what its host compiled.
OBJECTS = Path("build", f"{sysconfig.get_platform()}-{''.join(platform.libc_ver())}")


def why_nothing_is_compiled() -> str | None:
    switch = os.environ.get("SDATTN_FAST_CPU") or "auto"
    if switch not in ("0", "1", "auto"):
        raise SystemExit(f"SDATTN_FAST_CPU: expected 0, 1 or auto, got {switch!r}")
    if switch == "0":
        return "SDATTN_FAST_CPU is 0"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if sys.platform == "win32":
        why = "its C++ is for GCC and Clang, and not for Windows"
    elif sysconfig.get_config_var("Py_GIL_DISABLED"):
        why = "a free-threaded CPython has no limited API"
    elif not shutil.which(compiler):
        why = f"there is no C++ compiler: {compiler} is not found, and CXX may name another"
    else:
        return None
    if switch == "1":
        raise SystemExit(f"SDATTN_FAST_CPU is 1, but {why}")
    return why


NOTHING_COMPILED = why_nothing_is_compiled()
try:
    CUDA_BUILD = NOTHING_COMPILED or nvcc.choose()
except (ValueError, nvcc.NvccMissing) as error:
    raise SystemExit(str(error)) from error


class BuildAnew(build):
    """Without what an earlier build left behind: it would go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPython(build_py):
    def run(self) -> None:
        if NOTHING_COMPILED:
            print(f"sdattn_fast: nothing is compiled, the package is Python alone: {NOTHING_COMPILED}")
        super().run()


class BuildWithNinja(build_ext):
    """Every source with a command of its own, all at once, and only what has changed."""

    def build_extensions(self) -> None:
        if isinstance(CUDA_BUILD, str):
            print(f"sdattn_fast: built for CPUs alone, without CUDA code: {CUDA_BUILD}")
        (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
        plan = OBJECTS / "build.ninja"
        with open(ROOT / plan, "w") as file:
            modules = self._write(Writer(file, width=10**6))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ran = subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(plan), *jobs], cwd=ROOT)
        if ran.returncode:
            raise SystemExit("a compiler failed: its words are above")
        for name, built in modules.items():
            to = Path(self.get_ext_fullpath(name))
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / built, to)

    def copy_extensions_to_source(self) -> None:
        # A new file each time: one that a running process has mapped is never written to. And none is left of a build
        # with CUDA under one without.
        for old in (ROOT / "sdattn_fast").glob("*.so"):
            old.unlink()
        super().copy_extensions_to_source()

    def _write(self, plan: Writer) -> dict[str, Path]:
        """Writes what ninja is to do; which file each module will be."""
        plan.variable("builddir", OBJECTS.as_posix())
        plan.rule("compile", "$compiler -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc", description="$in")
        plan.rule("link", "$linker -o $out $in $libraries", description="$out")
        openmp = self._accepted("-fopenmp")
        common = FLAGS + self._accepted("-fno-gnu-unique", "-Wno-psabi", "-Wno-uninitialized") + openmp
        python = [f"-I{sysconfig.get_path('include')}"]
        modules = {}
        for extension in self.extensions:
            libraries = openmp if extension.name == "sdattn_fast._core" else []
            objects = []
            for source in extension.sources:
                built = f"{OBJECTS.as_posix()}/{source}.o"
                if source.endswith(".cu"):
                    command, libraries = self._cuda()
                elif source.endswith("bindings.cpp"):
                    command = [*self.compiler.compiler_so_cxx, *common, *python]
                else:
                    command = [*self.compiler.compiler_so_cxx, *common, *FLAGS_OF.get(source, [])]
                plan.build(built, "compile", source, variables={"compiler": shell([*command, "-MMD"])})
                objects.append(built)
            module = f"{OBJECTS.as_posix()}/{extension.name.removeprefix('sdattn_fast.')}.abi3.so"
            link = {"linker": shell([*self.compiler.linker_so_cxx, "-Wl,-s"]), "libraries": shell(libraries)}
            plan.build(module, "link", objects, variables=link)
            modules[extension.name] = Path(module)
        return modules

    def _cuda(self) -> tuple[list[str], list[str]]:
        """How to compile a .cu file, and what to link with. The runtime is linked in: it loads without a driver."""
        tool, built_for = CUDA_BUILD
        small = ["--compress-mode=size"] if tool.version >= (13, 0) else ["-Xfatbin", "-compress-all"]
        names = f'-DSDATTN_CUDA_ARCHITECTURES="{built_for.names}"'
        command = [str(tool.path), *NVCC_FLAGS, *small, *built_for.flags, names]
        return command, [str(tool.runtime), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]

    def _accepted(self, *flags: str) -> list[str]:
        """Those of the flags that this compiler and linker take."""
        probe = Path(self.build_temp) / "probe.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("int main() { return 0; }\n")
        return [f for f in flags if self._takes(str(probe), f)]

    def _takes(self, probe: str, flag: str) -> bool:
        try:
            objects = self.compiler.compile([probe], output_dir="/", extra_postargs=[flag, "-Werror"])
            self.compiler.link_executable(objects, probe + ".out", extra_postargs=[flag], target_lang="c++")
        except Exception:
            print(f"compiler: goes without {flag}")
            return False
        return True


def shell(words: list[str]) -> str:
    """One line of a shell, for ninja."""
    return shlex.join(words).replace("$", "$$")


core = Extension("sdattn_fast._core", CPU_SOURCES, language="c++", py_limited_api=True)
cuda = Extension("sdattn_fast._cuda", CUDA_SOURCES, language="c++", py_limited_api=True)

# Wheels of two CUDA majors must not have one name: cu12 makes it 0.1.0+cu12.
local = os.environ.get("SDATTN_FAST_LOCAL_VERSION")

setup(
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        **({"egg_info": {"tag_build": f"+{local}"}} if local else {}),
    },
    py_modules=["sdattn_fast_command"],
    packages=[*find_packages(include=["sdattn_fast*"]), "sdattn_fast.kernels"],
    package_dir={"sdattn_fast": "sdattn_fast", "sdattn_fast.kernels": "kernels"},
    ext_modules=[] if NOTHING_COMPILED else [core] if isinstance(CUDA_BUILD, str) else [core, cuda],
    cmdclass={"build": BuildAnew, "build_py": BuildPython, "build_ext": BuildWithNinja},
)
