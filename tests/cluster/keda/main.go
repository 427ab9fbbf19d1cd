// Command keda runs KEDA's controller of ScaledObjects with all scalers and its scale loop, as KEDA's operator does. Left out of
// that: ScaledJobs, whose definition alone has 670 KB, TriggerAuthentications, cloud events, and the gRPC service that KEDA's
// metrics adapter asks. Without this adapter, the HorizontalPodAutoscaler that KEDA makes knows its bounds and no metric.
//
//	keda KUBECONFIG
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	kedav1alpha1 "github.com/kedacore/keda/v2/apis/keda/v1alpha1"
	kedacontrollers "github.com/kedacore/keda/v2/controllers/keda"
	"github.com/kedacore/keda/v2/pkg/eventemitter"
	"github.com/kedacore/keda/v2/pkg/k8s"
	"github.com/kedacore/keda/v2/pkg/metricscollector"
	"github.com/kedacore/keda/v2/pkg/scalers/authentication"
	"github.com/kedacore/keda/v2/pkg/scaling"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

const timeout = 5 * time.Second

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: keda KUBECONFIG")
		os.Exit(2)
	}
	stopped, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctrl.SetLogger(zap.New())
	if err := run(stopped, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return err
	}
	if err := kedav1alpha1.AddToScheme(scheme); err != nil {
		return err
	}
	metricscollector.NewMetricsCollectors(metricscollector.Options{})
	manager, err := ctrl.NewManager(config, ctrl.Options{Scheme: scheme, Metrics: server.Options{BindAddress: "0"}})
	if err != nil {
		return err
	}
	scale, _, err := k8s.InitScaleClient(manager)
	if err != nil {
		return err
	}
	recorder, noSecrets := manager.GetEventRecorder("keda-operator"), &authentication.AuthClientSet{}
	handler := scaling.NewScaleHandler(manager.GetClient(), scale, scheme, timeout, timeout, recorder, noSecrets)
	objects := kedacontrollers.ScaledObjectReconciler{
		Client:       manager.GetClient(),
		Scheme:       scheme,
		ScaleClient:  scale,
		ScaleHandler: handler,
		EventEmitter: eventemitter.NewEventEmitter(manager.GetClient(), recorder, "test", noSecrets),
	}
	if err := objects.SetupWithManager(manager, controller.Options{}); err != nil {
		return err
	}
	return manager.Start(ctx)
}
