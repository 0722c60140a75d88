"""What pyproject.toml cannot say: the compiled core, one translation unit per instruction set, and where kernels/ goes.

No torch at build time, so build isolation works and one wheel per Python serves every torch. OpenMP is used where the
compiler has it; at run time the core is loaded after torch and shares torch's own libgomp and its threads.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The folder kernels/ beside this file must not hide PyPI's package of that name from anything the build imports.
ROOT = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import pybind11  # noqa: E402
from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

CPU = "csrc/cpu"
SOURCES = ["csrc/bindings.cpp", f"{CPU}/attention.cpp", f"{CPU}/backward.cpp", f"{CPU}/isa_portable.cpp"]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
FLAGS_OF = {}  # of one source, beside FLAGS

if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    FLAGS_OF = {
        f"{CPU}/isa_avx2.cpp": ["-mavx2", "-mfma"],
        f"{CPU}/isa_avx512.cpp": AVX512,
        f"{CPU}/isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    }
    SOURCES += FLAGS_OF


class BuildInParallel(build_ext):
    """Every source with flags of its own, all at once."""

    def build_extension(self, ext: Extension) -> None:
        common = FLAGS + self._accepted("-fno-gnu-unique", "-Wno-psabi", "-Wno-uninitialized", "-fopenmp")
        include = [*ext.include_dirs, *self.compiler.include_dirs]

        def build(source: str) -> list[str]:
            flags = common + FLAGS_OF.get(source, [])
            return self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=include, extra_postargs=flags
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for built in pool.map(build, ext.sources) for o in built]
        link = [f for f in common if f == "-fopenmp"]
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, path, extra_postargs=link, target_lang="c++")

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


core = Extension(
    "sdattn_fast._core",
    SOURCES,
    include_dirs=[pybind11.get_include()],
    depends=[str(p.relative_to(ROOT)) for suffix in ("h", "inl") for p in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))],
    language="c++",
)

setup(
    packages=[*find_packages(include=["sdattn_fast*"]), "sdattn_fast.kernels"],
    package_dir={"sdattn_fast": "sdattn_fast", "sdattn_fast.kernels": "kernels"},
    ext_modules=[core],
    cmdclass={"build_ext": BuildInParallel},
)
